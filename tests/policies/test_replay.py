import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import decide, hand_trace, make_trace, overthinking, patience_exit, traces

from shallowdeep.errors import ConfigError, TraceError
from shallowdeep.policies.replay import Curve, oracle, replay, sweep, sweep_confidence
from shallowdeep.policies.rules import Confidence, Patience

TRACE = hand_trace()
UNLABELLED = replace(TRACE, labels=None)
MIXED = replace(TRACE, logits=(torch.zeros(4, 3), *TRACE.logits[1:]))


def test_a_confidence_by_hand():
    decisions = replay(TRACE, Confidence(0.72))
    assert decisions.exits.tolist() == [0, 1, 2, 0]
    assert decisions.predictions.tolist() == [0, 1, 0, 1]
    assert decisions.costs.tolist() == [0.5, 0.85, 1.15, 0.5]
    torch.testing.assert_close(decisions.scores[:, 1], torch.tensor([0.1, 0.75, 0.45, 0.85]))
    assert decisions.accuracy == 0.5
    assert decisions.cost == pytest.approx(0.75, abs=1e-15)
    assert decisions.exit_shares == [0.5, 0.25, 0.25]
    assert decisions.rows() == [
        {"exit": 0, "share": 0.5, "accuracy": 0.5, "agreement": 1.0},
        {"exit": 1, "share": 0.25, "accuracy": 1.0, "agreement": 1.0},
        {"exit": 2, "share": 0.25, "accuracy": 0.0, "agreement": 1.0},
    ]
    expected = {
        "n": 4, "accuracy": 0.5, "agreement": 1.0, "cost": pytest.approx(0.75), "exit_shares": [0.5, 0.25, 0.25]
    }  # fmt: skip
    assert json.loads(json.dumps(decisions.to_dict())) == expected
    assert str(decisions) == (
        "accuracy 50.00 %, agreement with the last exit 100.00 %, cost 75.0 % of the plain network, "
        "leaving at each exit (%): 50 25 25"
    )


def test_agreement_by_hand():
    decisions = replay(TRACE, Confidence(0.62))
    assert decisions.predictions.tolist() == [0, 1, 1, 1]
    assert decisions.agreement == 0.75  # the last exit says 0 1 0 1
    assert [row["agreement"] for row in decisions.rows()] == [pytest.approx(2 / 3), 1.0, None]


def test_a_patience_by_hand():
    decisions = replay(TRACE, Patience(1))
    assert decisions.exits.tolist() == [1, 2, 2, 1]
    assert decisions.predictions.tolist() == [0, 1, 0, 1]
    assert decisions.cost == pytest.approx(1.0, abs=1e-15)
    assert decisions.rows()[0] == {"exit": 0, "share": 0.0, "accuracy": None, "agreement": None}


def test_the_most_confident_answer_by_hand():
    decisions = replay(TRACE, Confidence(0.88, answer="most_confident"))
    assert decisions.exits.tolist() == [0, 2, 2, 2]
    torch.testing.assert_close(decisions.scores[:, 1], torch.tensor([0.1, 0.9, 0.3, 0.85]))
    assert decisions.costs.tolist() == [0.5, 1.15, 1.15, 1.15]


def test_exits_switched_off_by_hand():
    decisions = replay(TRACE, Confidence(0.72, exits=(1,)))
    assert decisions.exits.tolist() == [1, 1, 2, 2]
    assert decisions.costs.tolist() == [0.75, 0.75, 1.05, 1.05]  # the head of exit 0 is not paid
    assert replay(TRACE, Confidence(0.0, exits=())).costs.tolist() == [1.0] * 4


def test_shares_are_exact():
    assert replay(TRACE, Confidence(0.0)).exit_shares == [1.0, 0.0, 0.0]
    assert replay(TRACE.select(torch.tensor([0, 1, 2])), Confidence(0.72)).exit_shares == [1 / 3, 1 / 3, 1 / 3]


def test_without_labels_there_are_decisions_and_no_accuracy():
    decisions = replay(UNLABELLED, Confidence(0.72))
    assert decisions.exits.tolist() == [0, 1, 2, 0]
    assert decisions.rows()[1] == {"exit": 1, "share": 0.25, "agreement": 1.0}
    assert decisions.to_dict()["accuracy"] is None
    assert str(decisions).startswith("agreement with the last exit 100.00 %, cost 75.0 % of")
    with pytest.raises(TraceError, match="accuracy needs labels"):
        _ = decisions.accuracy
    for needs_labels in (oracle, sweep_confidence):
        with pytest.raises(TraceError, match="needs labels"):
            needs_labels(UNLABELLED)


def test_the_exits_looked_at_have_one_width():
    assert replay(MIXED, Confidence(0.72, exits=(1,))).exits.tolist() == [1, 1, 2, 2]
    assert sweep_confidence(MIXED, exits=(1,)).cost[0] == 0.75
    for answers in (lambda trace: replay(trace, Patience(1)), oracle, sweep_confidence):
        with pytest.raises(TraceError, match=r"one width; these give \(exit: outputs\) {0: 3, 1: 2, 2: 2}"):
            answers(MIXED)


def test_one_label_set_answers():
    both = replace(TRACE, info=replace(TRACE.info, label_spaces={"fine": 1, "coarse": 1}))
    for answers in (
        lambda trace: replay(trace, Confidence(0.72)),
        lambda trace: sweep(trace, lambda patience: Patience(int(patience)), [1.0]),
        oracle,
        sweep_confidence,
    ):
        with pytest.raises(TraceError, match=r"several label sets \(fine, coarse\); an answer is in one"):
            answers(both)


def test_exits_that_the_trace_lacks():
    for answers in (
        lambda trace: replay(trace, Confidence(0.5, (2,))),
        lambda trace: sweep_confidence(trace, exits=(2,)),
    ):
        with pytest.raises(ConfigError, match=r"looks at exits \[2\]; this network's internal exits are \[0, 1\]"):
            answers(TRACE)


def test_the_oracle_by_hand():
    best = oracle(TRACE)
    assert best.exits.tolist() == [0, 1, 0, 2]
    assert (best.accuracy, best.cost) == (0.75, pytest.approx(0.75, abs=1e-15))
    torch.testing.assert_close(best.scores[:, 1], torch.tensor([0.1, 0.75, 0.65, 0.6]))


@given(traces())
def test_the_oracle_leaves_at_the_first_right_exit(trace):
    best, naive = oracle(trace), overthinking(trace)
    assert best.cost == pytest.approx(naive["oracle_cost"], abs=1e-12)
    assert best.accuracy == naive["cumulative"][-1]


@given(trace=traces(), threshold=st.sampled_from([0.0, 0.5, 0.7, 1.0, 1.5]))
def test_no_policy_beats_the_oracle(trace, threshold):
    assert replay(trace, Confidence(threshold)).accuracy <= oracle(trace).accuracy


def test_classes_equally_likely_in_float32_are_answered_alike_everywhere():
    logits = torch.tensor([[0.0, 2e-8]])  # both probabilities round to one half
    trace = replace(TRACE.select(torch.tensor([0])), logits=(logits,) * 3, labels=torch.tensor([1]))
    never = replay(trace, Confidence(1.5))
    assert torch.equal(never.predictions, trace.predictions[:, -1])
    assert sweep_confidence(trace).accuracy[-1] == never.accuracy


def test_a_sweep_is_one_replay_per_setting_in_rising_order():
    trace = make_trace(40)
    curve = sweep(trace, lambda patience: Patience(int(patience)), [2.0, 0.0, 1.0])
    assert curve.thresholds.tolist() == [0.0, 1.0, 2.0]
    assert curve.policy(1.0) == Patience(1)
    for patience, accuracy, cost in zip(range(3), curve.accuracy.tolist(), curve.cost.tolist(), strict=True):
        naive = decide(trace, patience_exit(patience))
        predictions = torch.tensor([d.scores for d in naive]).argmax(1)
        assert accuracy == pytest.approx((predictions == trace.labels).double().mean().item())
        assert cost == pytest.approx(sum(d.cost for d in naive) / 40)


def curve_of(*points):
    accuracy, cost = torch.tensor(points, dtype=torch.float64).T
    return Curve(torch.arange(len(points)).double(), accuracy, cost, Confidence)


def test_the_best_of_a_curve_within_a_budget():
    curve = curve_of((0.5, 0.2), (0.75, 0.4), (0.75, 0.3), (0.9, 0.8), (0.75, 0.35))
    assert [curve.best_within(budget) for budget in (0.1, 0.2, 0.5, 0.8, None)] == [None, 0, 2, 3, 3]
    # 0.1 + 0.2 is a little more than 0.3 in floating point, and still within that budget
    assert curve_of((0.5, 0.1 + 0.2)).best_within(0.3) == 0


def test_the_cheapest_of_a_curve_that_is_accurate_enough():
    curve = curve_of((0.5, 0.2), (0.75, 0.4), (0.8, 0.4), (0.9, 0.8))
    assert [curve.cheapest_above(floor) for floor in (0.0, 0.75, 0.85, 0.95)] == [0, 2, 3, None]
    assert curve_of((0.3, 0.5)).cheapest_above(0.1 + 0.2) == 0
