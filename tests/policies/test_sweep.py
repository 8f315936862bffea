"""The exact sweep of all confidence thresholds."""

from dataclasses import replace
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import hand_trace, make_trace, subsets, traces

from shallowdeep.errors import ConfigError
from shallowdeep.policies.replay import replay, sweep_confidence
from shallowdeep.policies.rules import Confidence
from shallowdeep.traces.trace import Trace

ANSWERS = ("last", "most_confident")
EITHER_ANSWER = pytest.mark.parametrize("answer", ANSWERS)
BIG = make_trace(300, num_exits=6, num_classes=10, seed=3)


def one_exit_trace(confidence_logits: torch.Tensor, *, exits: int = 2) -> Trace:
    """Two classes, every exit with the same logits (x, 0)."""
    logits = torch.stack([confidence_logits, torch.zeros_like(confidence_logits)], dim=1)
    n = len(logits)
    return Trace((logits,) * exits, torch.arange(n) % 2, torch.arange(n), reference.make_costs(exits))


def check_sweep(trace, exits, answer):
    """It says what a replay says at every threshold, and lacks no set of decisions there is."""
    curve = sweep_confidence(trace, exits=exits, answer=answer)
    found = []
    for threshold, accuracy, cost in zip(
        *(x.tolist() for x in (curve.thresholds, curve.accuracy, curve.cost)), strict=True
    ):
        decisions = replay(trace, curve.policy(threshold))
        assert accuracy == decisions.accuracy
        assert cost == pytest.approx(decisions.cost, abs=1e-12)
        found.append(tuple(decisions.exits.tolist()))
    assert len(set(found)) == len(found)
    assert set(found) == {choice.exits for choice in reference.every_confidence_choice(trace, exits, answer)}
    assert (curve.thresholds.diff() > 0).all()
    assert (curve.cost.diff() >= 0).all()
    return curve


def test_by_hand():
    curve = sweep_confidence(hand_trace())
    assert curve.thresholds.tolist() == pytest.approx([0.3, 0.625, 0.675, 0.725, 0.8, 0.875, 0.95], abs=1e-6)
    assert curve.accuracy.tolist() == [0.5, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert curve.cost.tolist() == pytest.approx([0.5, 0.5875, 0.675, 0.75, 0.825, 0.9875, 1.15], abs=1e-12)
    assert curve.policy(0.625) == Confidence(0.625)


def test_by_hand_with_the_most_confident_answer():
    curve = sweep_confidence(hand_trace(), answer="most_confident")
    # sample 2, and from 0.85 sample 3, would be answered by an internal exit at full cost
    assert curve.accuracy.tolist() == [0.5, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert curve.cost.tolist() == pytest.approx([0.5, 0.5875, 0.675, 0.75, 0.825, 0.9875, 1.15], abs=1e-12)
    assert curve.policy(0.625) == Confidence(0.625, answer="most_confident")
    flipped = replace(hand_trace(), labels=torch.tensor([0, 1, 0, 0]))  # now exit 1, the surest, is right on sample 2
    assert sweep_confidence(flipped, answer="most_confident").accuracy.tolist() == [
        0.25,
        0.5,
        0.75,
        0.75,
        0.75,
        0.75,
        0.75,
    ]


@EITHER_ANSWER
@given(data=st.data())
def test_says_what_replay_says_and_lacks_nothing(answer, data):
    trace = data.draw(traces())
    check_sweep(trace, data.draw(subsets(trace.num_exits)), answer)


@EITHER_ANSWER
@pytest.mark.parametrize("exits", [None, (), (2,), (0, 3, 4)])
def test_says_what_replay_says_on_many_samples(answer, exits):
    trace = make_trace(40, num_exits=6, num_classes=10, seed=3)
    curve = check_sweep(trace, exits, answer)
    assert (len(curve.thresholds) > 30) == (exits != ())


@EITHER_ANSWER
def test_one_sample(answer):
    assert len(check_sweep(BIG.select(torch.tensor([5])), None, answer).thresholds) > 1


@EITHER_ANSWER
def test_one_exit_is_one_entry(answer):
    trace = BIG.select(torch.arange(40)).select_exits([5])
    curve = check_sweep(trace, None, answer)
    assert (curve.cost.tolist(), len(curve.thresholds)) == ([1.0], 1)
    assert curve.accuracy.item() == trace.correct[:, -1].double().mean()


@EITHER_ANSWER
def test_one_class_is_always_sure(answer):
    trace = Trace((torch.zeros(2, 1),) * 3, torch.zeros(2).long(), torch.arange(2), reference.make_costs(3))
    curve = check_sweep(trace, None, answer)
    assert curve.thresholds[0] < 1 < curve.thresholds[1]


@EITHER_ANSWER
def test_confidences_of_exactly_one(answer):
    trace = one_exit_trace(torch.tensor([50.0, 0.5, 200.0]))
    curve = check_sweep(trace, None, answer)
    assert curve.thresholds[-1] == 1 + 2**-23  # the next float32 above 1: nothing less tells 1 from never
    assert curve.cost[-1] == trace.costs.relative()[-1]


@EITHER_ANSWER
def test_confidences_that_are_neighbouring_floats(answer):
    trace = one_exit_trace(torch.linspace(0, 1e-5, 60))
    met = trace.confidences[:, 0].unique()
    assert len(met) > 30
    assert (met.diff() == 2**-24).all()  # nothing lies between them
    check_sweep(trace, None, answer)


def test_thresholds_lie_half_way_between_the_confidences_that_bound_them():
    curve = sweep_confidence(BIG)
    bounds = [0.0, *sorted({max(row[: i + 1]) for row in BIG.confidences[:, :-1].tolist() for i in range(5)}), 1.0]
    middles = [(low + high) / 2 for low, high in pairwise(bounds)]
    assert curve.thresholds.tolist() == pytest.approx(middles, abs=2**-24)
    gaps = torch.tensor(bounds, dtype=torch.float64).diff()
    clear = gaps > 2**-22  # a gap with room for a float that is a neighbour of neither end
    distance = (curve.thresholds - torch.tensor(bounds[:-1], dtype=torch.float64)).minimum(
        torch.tensor(bounds[1:], dtype=torch.float64) - curve.thresholds
    )
    assert clear.sum() > 500
    assert (distance[clear] > 2**-24).all()


def test_thresholds_survive_float32_and_json():
    thresholds = sweep_confidence(BIG).thresholds
    assert torch.equal(thresholds.float().double(), thresholds)


def test_ends_with_the_first_exit_for_all_and_the_last_for_all():
    curve = sweep_confidence(BIG)
    shallow, deep = (replay(BIG, curve.policy(threshold)) for threshold in curve.thresholds[[0, -1]].tolist())
    assert set(shallow.exits.tolist()) == {0}
    assert set(deep.exits.tolist()) == {5}


def test_unknown_answers(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="'last' or 'most_confident', got 'surest'"):
        sweep_confidence(BIG, answer="surest")
