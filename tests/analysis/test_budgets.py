import json
from dataclasses import asdict, astuple, replace

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import hand_trace, make_trace, traces

from shallowdeep.analysis.budgets import BUDGETS, cross_fit_budgets, measure_budgets
from shallowdeep.data.stratify import stratified_split
from shallowdeep.errors import CalibrationError, TraceError
from shallowdeep.policies.calibrate import calibrate
from shallowdeep.policies.replay import replay

VAL, TEST = hand_trace(), hand_trace(split="test").select(torch.tensor([0, 1, 3]))
FOUND = measure_budgets(VAL, TEST, budgets=(0.25, 0.7, None))


def test_by_hand():
    chosen = pytest.approx(0.625, abs=1e-6)
    # sample 0 leaves at exit 0, sample 1 at exit 1, sample 3, sure of a wrong class, at exit 0
    on_test = (2 / 3, pytest.approx((0.5 + 0.85 + 0.5) / 3, abs=1e-12))
    on_val = (0.75, pytest.approx(0.5875, abs=1e-12))
    assert [astuple(row) for row in FOUND.table] == [
        (0.25, None, None, None, None, None, None, None),
        (0.7, chosen, *on_val, *on_test, *on_test),
        (None, chosen, *on_val, *on_test, *on_test),
    ]
    assert (FOUND.last_accuracy, FOUND.n) == (pytest.approx(2 / 3), 3)


def test_validation_chooses_and_test_is_reported():
    val, test = make_trace(60, seed=1), make_trace(50, seed=2, split="test")
    found = measure_budgets(val, test, budgets=(0.5, 0.75, None))
    for row in found.table[:2]:
        policy = calibrate(val, max_cost=row.budget)
        decisions = replay(test, policy)
        assert row.threshold == policy.threshold
        assert (row.accuracy, row.cost) == (decisions.accuracy, decisions.cost)
        assert row.val_cost <= row.budget
        assert row.test_chosen_cost <= row.budget
    best = max(choice.accuracy for choice in reference.every_confidence_choice(test))
    assert found.table[2].test_chosen_accuracy == best > found.table[2].accuracy


@pytest.mark.parametrize("rule", ["confidence", "patience"])
@given(data=st.data())
def test_both_choices_are_brute_forces(rule, data):
    trace = data.draw(traces())
    half = torch.arange(len(trace)) < max(1, len(trace) // 2)
    val, test = trace.select(half), replace(trace, info=replace(trace.info, split="test"))
    budget = data.draw(st.floats(0.1, 1.2))
    (row,) = measure_budgets(val, test, budgets=(budget,), rule=rule).table
    every = reference.every_patience_choice if rule == "patience" else reference.every_confidence_choice
    for split, accuracy, cost in (
        (val, row.val_accuracy, row.val_cost),
        (test, row.test_chosen_accuracy, row.test_chosen_cost),
    ):
        best = reference.best_within(every(split), budget)
        if best is None:
            assert (accuracy, cost) == (None, None)
        else:
            assert (accuracy, cost) == pytest.approx(best, abs=1e-12)


def test_the_papers_budgets():
    assert BUDGETS == (0.25, 0.5, 0.75, None)
    assert [row.budget for row in measure_budgets(VAL, TEST).table] == [0.25, 0.5, 0.75, None]


def test_rule_and_answer_are_used():
    patience = measure_budgets(VAL, TEST, rule="patience")
    assert [row.threshold for row in patience.table] == [None, 0.0, 0.0, 0.0]
    val, test = make_trace(40, noise=2.0), make_trace(40, seed=5, noise=2.0, split="test")
    last, surest = (measure_budgets(val, test, answer=answer).table[3] for answer in ("last", "most_confident"))
    assert surest.val_accuracy != last.val_accuracy
    assert surest.test_chosen_accuracy != last.test_chosen_accuracy
    best = max(choice.accuracy for choice in reference.every_confidence_choice(test, answer="most_confident"))
    assert surest.test_chosen_accuracy == best


def test_rows_and_to_dict_are_json():
    rows = FOUND.rows()
    assert [row["budget"] for row in rows] == ["≤ 25 %", "≤ 70 %", "max"]
    assert rows[0]["accuracy"] is None
    assert rows[1] == {
        "budget": "≤ 70 %",
        "threshold": FOUND.table[1].threshold,
        "accuracy": FOUND.table[1].accuracy,
        "cost": FOUND.table[1].cost,
        "val accuracy": 0.75,
        "val cost": FOUND.table[1].val_cost,
        "test-chosen accuracy": FOUND.table[1].test_chosen_accuracy,
        "test-chosen cost": FOUND.table[1].test_chosen_cost,
    }
    assert json.loads(json.dumps(rows)) == rows
    values = json.loads(json.dumps(FOUND.to_dict()))
    assert values == asdict(FOUND) | {"table": [asdict(row) for row in FOUND.table]}


def test_str():
    assert str(FOUND) == (
        "Last exit: 66.67 % on 3 samples.\n"
        "at most 25 % of the cost: no threshold is that cheap.\n"
        "at most 70 % of the cost: 66.67 % at 61.7 %.\n"
        "any cost: 66.67 % at 61.7 %."
    )


def cut(trace, seed):
    return [trace.select(rows) for rows in stratified_split(trace.labels, len(trace) // 2, seed)]


def test_cross_fitting_by_hand():
    """Samples 0 and 1 choose 0.675: 0 leaves at exit 0, 1 at exit 1. Samples 2 and 3 choose exit 0 for both."""
    trace = hand_trace(split="test")
    assert [half.ids.tolist() for half in cut(trace, 3)] == [[7, 3], [11, 2]]
    found = cross_fit_budgets(trace, seed=3, budgets=(0.25, 0.7, None))
    chosen = (pytest.approx(0.675, abs=1e-6), pytest.approx(0.325, abs=1e-6))
    # each used on the other half: at exit 0, sample 1 is wrong; at 0.675, sample 2 leaves at exit 1 and is wrong too
    on_test = (0.25, pytest.approx((0.5 + 0.5 + 0.85 + 0.5) / 4))
    assert [astuple(row) for row in found.table] == [
        (0.25, None, None, None, None, None, None, None),
        (0.7, chosen, 0.75, pytest.approx(0.5875), *on_test, 0.75, pytest.approx(0.5875)),
        (None, chosen, 0.75, pytest.approx(0.5875), *on_test, 0.75, pytest.approx(0.5875)),
    ]
    assert (found.last_accuracy, found.n) == (0.5, 4)
    assert found.chosen_on == "cross-fitted halves of the test split"
    assert FOUND.chosen_on == "validation"


def check_cross_fit(trace, seed, budget, rule):
    every = reference.every_patience_choice if rule == "patience" else reference.every_confidence_choice
    naive_rule = reference.patience_exit if rule == "patience" else reference.confidence_exit
    halves = cut(trace, seed)
    found = cross_fit_budgets(trace, seed=seed, budgets=(budget,), rule=rule)
    (row,) = found.table
    best = [reference.best_within(every(half), budget) for half in halves]
    if best[0] is None:
        assert astuple(row)[1:] == (None,) * 7
        return
    right = cost = chosen_right = chosen_cost = 0.0
    for half, other, threshold, (best_accuracy, best_cost) in zip(
        halves, reversed(halves), row.threshold, best, strict=True
    ):
        accuracy, mean_cost = reference.accuracy_and_cost(half, reference.decide(half, naive_rule(threshold)))
        assert (accuracy, mean_cost) == pytest.approx((best_accuracy, best_cost), abs=1e-12)
        chosen_right, chosen_cost = chosen_right + accuracy * len(half), chosen_cost + mean_cost * len(half)
        accuracy, mean_cost = reference.accuracy_and_cost(other, reference.decide(other, naive_rule(threshold)))
        right, cost = right + accuracy * len(other), cost + mean_cost * len(other)
    assert (row.accuracy, row.cost) == pytest.approx((right / found.n, cost / found.n), abs=1e-12)
    assert (row.val_accuracy, row.val_cost) == pytest.approx((chosen_right / found.n, chosen_cost / found.n), abs=1e-12)
    test_chosen = (row.test_chosen_accuracy, row.test_chosen_cost)
    assert test_chosen == pytest.approx(reference.best_within(every(trace), budget), abs=1e-12)


@pytest.mark.parametrize("rule", ["confidence", "patience"])
@settings(max_examples=50)
@given(data=st.data())
def test_cross_fitting_is_brute_force(rule, data):
    trace = data.draw(traces(split="test"))
    assume(len(trace) > 1)
    check_cross_fit(trace, data.draw(st.integers(0, 3)), data.draw(st.floats(0.1, 1.2)), rule)


@pytest.mark.parametrize("n", [40, 41])
def test_cross_fitting_of_many_samples(n):
    trace = make_trace(n, split="test", noise=1.5)
    check_cross_fit(trace, 0, 0.75, "confidence")
    found = cross_fit_budgets(trace, budgets=(0.75, None))
    assert found == cross_fit_budgets(trace, budgets=(0.75, None), seed=0)
    assert found != cross_fit_budgets(trace, budgets=(0.75, None), seed=1)
    one, other = found.table[1].threshold
    assert one != other
    assert found.table[1].accuracy < found.table[1].test_chosen_accuracy
    surest = cross_fit_budgets(trace, budgets=(None,), answer="most_confident")
    assert surest.table[0].threshold != found.table[1].threshold
    best = max(choice.accuracy for choice in reference.every_confidence_choice(trace, answer="most_confident"))
    assert surest.table[0].test_chosen_accuracy == best


def test_cross_fitted_rows_and_text_say_so():
    found = cross_fit_budgets(hand_trace(split="test"), seed=3, budgets=(0.25, 0.7))
    rows = found.rows()
    names = ["budget", "threshold", "accuracy", "cost", "choosing half's accuracy", "choosing half's cost"]
    assert list(rows[0]) == list(rows[1]) == [*names, "test-chosen accuracy", "test-chosen cost"]
    assert [row["threshold"] for row in rows] == [None, "0.6750 / 0.3250"]
    assert (rows[1]["accuracy"], rows[1]["choosing half's accuracy"]) == (0.25, 0.75)
    assert json.loads(json.dumps(rows)) == rows
    values = json.loads(json.dumps(found.to_dict()))
    assert values["chosen_on"] == "cross-fitted halves of the test split"
    assert values["table"][1]["threshold"] == list(found.table[1].threshold)
    assert str(found) == (
        "Last exit: 50.00 % on 4 samples.\n"
        "Thresholds from cross-fitted halves of the test split.\n"
        "at most 25 % of the cost: no threshold is that cheap.\n"
        "at most 70 % of the cost: 25.00 % at 58.8 %."
    )


def test_what_cannot_be_cross_fitted():
    for split in ("train", "val"):
        with pytest.raises(CalibrationError, match=f"halves of the {split} split are no fair test"):
            cross_fit_budgets(hand_trace(split=split))
    with pytest.raises(TraceError, match="one sample has no halves"):
        cross_fit_budgets(TEST.select(torch.tensor([0])))
    with pytest.raises(TraceError, match="needs labels"):
        cross_fit_budgets(replace(TEST, labels=None))


def test_what_budgets_cannot_be_measured_on():
    with pytest.raises(CalibrationError, match="not chosen on the test split"):
        measure_budgets(TEST, VAL)
    with pytest.raises(TraceError, match="of another network"):
        measure_budgets(VAL, TEST.select_exits([0, 2]))
    with pytest.raises(TraceError, match="needs labels"):
        measure_budgets(VAL, replace(TEST, labels=None))
