import json
from dataclasses import asdict, astuple, replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import hand_trace, make_trace, traces

from shallowdeep.analysis.budgets import BUDGETS, measure_budgets
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


def test_what_budgets_cannot_be_measured_on():
    with pytest.raises(CalibrationError, match="not chosen on the test split"):
        measure_budgets(TEST, VAL)
    with pytest.raises(TraceError, match="of another network"):
        measure_budgets(VAL, TEST.select_exits([0, 2]))
    with pytest.raises(TraceError, match="needs labels"):
        measure_budgets(VAL, replace(TEST, labels=None))
