import math
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import hand_trace, make_trace, traces

from shallowdeep.errors import CalibrationError, ConfigError, TraceError, UnknownName
from shallowdeep.policies.calibrate import calibrate, reference_accuracy, sweep_rule
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence, Patience

TRACE = hand_trace()
UNLABELLED = replace(TRACE, labels=None)
VAL = make_trace(200, num_exits=5, num_classes=6, seed=2)
RULES = st.sampled_from([("confidence", "last"), ("confidence", "most_confident"), ("patience", "last")])


def near(threshold, policy):
    """Whether it is a ``Confidence`` of about that threshold."""
    return policy == Confidence(policy.threshold) and policy.threshold == pytest.approx(threshold, abs=1e-6)


def every_choice(trace, rule, exits, answer):
    if rule == "patience":
        return reference.every_patience_choice(trace, exits)
    return reference.every_confidence_choice(trace, exits, answer)


@given(data=st.data(), settings=RULES)
def test_a_budget_is_kept_as_brute_force_would(data, settings):
    trace, (rule, answer) = data.draw(traces()), settings
    exits = data.draw(reference.subsets(trace.num_exits))
    choices = every_choice(trace, rule, exits, answer)
    # half of the budgets are exactly what something costs
    budget = data.draw(st.sampled_from([choice.cost for choice in choices]) | st.floats(0.1, 1.2))
    best = reference.best_within(choices, budget)
    if best is None:
        with pytest.raises(CalibrationError, match=rf"no {rule} threshold has a cost of at most {budget}"):
            calibrate(trace, max_cost=budget, rule=rule, exits=exits, answer=answer)
    else:
        decisions = replay(trace, calibrate(trace, max_cost=budget, rule=rule, exits=exits, answer=answer))
        assert (decisions.accuracy, decisions.cost) == pytest.approx(best, abs=1e-12)


@given(data=st.data(), settings=RULES)
def test_a_drop_is_kept_as_brute_force_would(data, settings):
    trace, (rule, answer) = data.draw(traces()), settings
    exits = data.draw(reference.subsets(trace.num_exits))
    choices = every_choice(trace, rule, exits, answer)
    last = trace.correct[:, -1].double().mean().item()
    drop = data.draw(st.sampled_from([last - choice.accuracy for choice in choices]) | st.floats(-0.5, 0.99))
    best = reference.cheapest_above(choices, last - drop)
    assume(best is not None and abs(drop) < 1)
    decisions = replay(trace, calibrate(trace, max_accuracy_drop=drop, rule=rule, exits=exits, answer=answer))
    assert (decisions.accuracy, decisions.cost) == pytest.approx(best, abs=1e-12)


def test_a_budget_by_hand():
    assert near(0.625, calibrate(TRACE, max_cost=0.8))
    assert near(0.3, calibrate(TRACE, max_cost=0.55))
    assert calibrate(TRACE, max_cost=1.0, rule="patience") == Patience(0)  # all are right on half: the cheapest
    with_settings = calibrate(TRACE, max_cost=0.9, exits=(1,), answer="most_confident")
    assert (with_settings.exits, with_settings.answer) == ((1,), "most_confident")


def test_a_drop_by_hand():
    assert near(0.3, calibrate(TRACE, max_accuracy_drop=0.0))
    assert near(0.625, calibrate(TRACE, max_accuracy_drop=-0.25))
    assert calibrate(TRACE, max_accuracy_drop=0.0, rule="patience") == Patience(0)


def test_among_equally_accurate_thresholds_the_cheapest():
    sure = replace(TRACE, logits=(TRACE.logits[1],) * 3)  # every exit says the same
    for demand in ({"max_cost": 1.15}, {"max_accuracy_drop": 0.0}):
        for rule in ("confidence", "patience"):
            assert replay(sure, calibrate(sure, rule=rule, **demand)).cost == 0.5


def test_demands_that_nothing_meets():
    with pytest.raises(CalibrationError, match=r"cost of at most 0.2: the cheapest threshold costs 0.5000"):
        calibrate(TRACE, max_cost=0.2)
    with pytest.raises(CalibrationError, match=r"cost of at most 0.6: the cheapest threshold costs 0.7500"):
        calibrate(TRACE, max_cost=0.6, exits=(1,))
    with pytest.raises(
        CalibrationError, match=r"patience threshold .* at least 0.8000: the best threshold reaches 0.5000"
    ):
        calibrate(TRACE, max_accuracy_drop=-0.3, rule="patience")


def test_no_threshold_is_chosen_on_the_test_split():
    test = hand_trace(split="test")
    with pytest.raises(CalibrationError, match="not chosen on the test split: pass the validation Trace"):
        calibrate(test, max_cost=0.8)
    assert calibrate(test, max_cost=0.8, allow_test=True) == calibrate(TRACE, max_cost=0.8)


@pytest.mark.parametrize(
    ("demands", "got"),
    [
        ({}, "none"),
        ({"max_cost": 0.5, "max_accuracy_drop": 0.0}, "{'max_cost': 0.5, 'max_accuracy_drop': 0.0}"),
        ({"max_cost": 0.5, "min_agreement": 0.0}, "{'max_cost': 0.5, 'min_agreement': 0.0}"),
    ],
)
def test_one_demand_at_a_time(demands, got):
    with pytest.raises(ConfigError, match=rf"one of max_cost, max_accuracy_drop, min_agreement, got {got}\."):
        calibrate(TRACE, **demands)


def original_trace(**changes):
    """Of a network that is right on three of the four samples, in another order."""
    logits = (*TRACE.logits[:-1], TRACE.logits[-1][:, [0, 1]].clone())
    logits[-1][2] = logits[-1][2].flip(0)
    return replace(TRACE, logits=logits, **changes).select(torch.tensor([2, 0, 3, 1]))


def test_a_drop_from_the_original_network():
    original = original_trace()
    assert reference_accuracy(TRACE, "original", original) == 0.75
    assert reference_accuracy(TRACE, "last", None) == 0.5
    chosen = calibrate(TRACE, max_accuracy_drop=0.0, reference="original", original=original)
    assert near(0.625, chosen)
    chosen = calibrate(TRACE, max_accuracy_drop=0.25, reference="original", original=original)
    assert near(0.3, chosen)


def test_after_ic_only_training_the_last_exit_is_the_original():
    frozen = hand_trace(strategy="ic_only")
    expected = calibrate(TRACE, max_accuracy_drop=0.0)
    assert calibrate(frozen, max_accuracy_drop=0.0, reference="original") == expected


def test_an_original_must_be_given_and_be_of_the_same_samples():
    with pytest.raises(CalibrationError, match="not in this Trace: pass original="):
        calibrate(TRACE, max_accuracy_drop=0.0, reference="original")
    other_labels = original_trace(labels=torch.tensor([0, 1, 1, 1]))
    for other in (TRACE.select(torch.tensor([0, 1, 2])), replace(TRACE, ids=torch.arange(4)), other_labels):
        with pytest.raises(CalibrationError, match="original network's Trace does not fit: the two Traces"):
            calibrate(TRACE, max_accuracy_drop=0.0, reference="original", original=other)


def test_an_original_of_the_test_split_is_refused():
    test = original_trace(info=hand_trace(split="test").info)
    unsaid = hand_trace(split="")
    with pytest.raises(CalibrationError, match="not chosen on the test split"):
        calibrate(unsaid, max_accuracy_drop=0.0, reference="original", original=test)
    chosen = calibrate(unsaid, max_accuracy_drop=0.0, reference="original", original=test, allow_test=True)
    assert near(0.625, chosen)
    with pytest.raises(CalibrationError, match="the two Traces are of the splits test and val"):
        calibrate(TRACE, max_accuracy_drop=0.0, reference="original", original=test, allow_test=True)


@pytest.mark.parametrize("demand", [{"max_accuracy_drop": 0.0}, {"max_cost": 0.8}])
def test_an_original_that_would_go_unused_is_refused(demand):
    with pytest.raises(ConfigError, match="drop is measured from 'last': pass reference='original'"):
        calibrate(TRACE, original=TRACE, **demand)


def test_unknown_names(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(UnknownName, match=r"no rule 'patient'. Did you mean 'patience'\? Known: confidence, patience"):
        calibrate(TRACE, max_cost=0.8, rule="patient")
    with pytest.raises(UnknownName, match=r"no reference 'first'. .*Known: last, original"):
        calibrate(TRACE, max_accuracy_drop=0.0, reference="first")
    with pytest.raises(ConfigError, match="answer='most_confident' is for confidence"):
        calibrate(TRACE, max_cost=0.8, rule="patience", answer="most_confident")


def test_a_drop_needs_labels():
    with pytest.raises(TraceError, match="needs labels"):
        calibrate(UNLABELLED, max_accuracy_drop=0.01)


@pytest.mark.parametrize(("agreement", "threshold"), [(1.0, 0.675), (0.75, 0.625), (0.5, 0.3)])
@pytest.mark.parametrize("trace", [TRACE, UNLABELLED])
def test_an_agreement_by_hand(trace, agreement, threshold):
    # the first exit answers 0 0 1 1, the last 0 1 0 1: sample 2 agrees from 0.65 on, sample 1 from 0.60
    policy = calibrate(trace, min_agreement=agreement)
    assert near(threshold, policy)
    assert replay(trace, policy).agreement >= agreement


@given(traces(), st.floats(0, 1))
def test_an_agreement_is_kept_as_cheaply_as_brute_force_would(trace, agreement):
    policy = calibrate(replace(trace, labels=None), min_agreement=agreement)
    choices = reference.every_confidence_choice(replace(trace, labels=trace.predictions[:, -1]))
    enough = [choice.cost for choice in choices if choice.accuracy >= agreement - 1e-9]
    assert replay(trace, policy).cost == pytest.approx(min(enough), abs=1e-9)


def test_a_budget_without_labels_keeps_the_most_agreement():
    assert near(0.675, calibrate(UNLABELLED, max_cost=0.8))


@pytest.mark.parametrize("agreement", [-0.1, 1.5])
def test_an_agreement_is_a_share(agreement):
    with pytest.raises(ConfigError, match=f"a share from 0 to 1, got min_agreement={agreement}"):
        calibrate(TRACE, min_agreement=agreement)


@pytest.mark.parametrize("max_cost", [50.0, float("inf"), float("nan")])
def test_a_cost_is_a_share(max_cost):
    with pytest.raises(
        ConfigError, match=r"a cost is a share of the plain network's, 0\.5 for half of it.* got max_cost="
    ):
        calibrate(make_trace(50, split="val"), max_cost=max_cost)


@pytest.mark.parametrize("drop", [1, 5.0, -1.0, math.nan])
def test_a_drop_is_a_share(drop, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # 1 is no float to it
    with pytest.raises(ConfigError, match=f"a share below 1 .*, got max_accuracy_drop={drop}"):
        calibrate(TRACE, max_accuracy_drop=drop)


def test_an_agreement_is_with_the_last_exit_alone():
    with pytest.raises(ConfigError, match="goes with max_accuracy_drop, not with min_agreement"):
        calibrate(TRACE, min_agreement=0.9, reference="original")


@pytest.mark.parametrize("exits", [None, (), (0, 2)])
def test_the_patience_family_runs_from_the_first_exit_to_the_last(exits):
    curve = sweep_rule(VAL, "patience", exits=exits)
    first, last = (replay(VAL, curve.policy(patience)) for patience in curve.thresholds[[0, -1]].tolist())
    assert curve.policy(0.0) == Patience(0, exits)
    assert set(first.exits.tolist()) == {4 if exits == () else 0}
    assert set(last.exits.tolist()) == {4}
    assert len(curve.thresholds) == {None: 5, (): 1, (0, 2): 3}[exits]
