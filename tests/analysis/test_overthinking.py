import json
from dataclasses import asdict, replace

import pytest
import reference
import torch
from hypothesis import given
from reference import hand_trace, make_trace, traces

from shallowdeep.analysis.overthinking import measure_overthinking
from shallowdeep.errors import TraceError

FOUND = measure_overthinking(hand_trace())


def test_by_hand():
    assert asdict(FOUND) == {
        "n": 4,
        "accuracy": (0.5, 0.5, 0.5),
        "cumulative": (0.5, 0.75, 0.75),
        "first_correct": (0.5, 0.25, 0.0),
        "wasteful": 0.75,
        "wasteful_and_right": 0.5,
        "destructive": 0.25,
        "destructive_of_errors": 0.5,
        "destructive_at": (0.25, 0.0, 0.0),
        "oracle_cost": pytest.approx((0.5 + 0.85 + 0.5 + 1.15) / 4, abs=1e-15),
        "oracle_cost_nominal": (0.25 + 0.5 + 0.25 + 1.0) / 4,
    }


def check(trace):
    naive = reference.overthinking(trace)
    found = asdict(measure_overthinking(trace))
    assert found.keys() == naive.keys()
    for name, value in naive.items():
        expected = None if value is None else pytest.approx(value, abs=1e-12)
        assert (list(found[name]) if isinstance(found[name], tuple) else found[name]) == expected, name


@given(traces())
def test_is_the_naive_count(trace):
    check(trace)


def test_is_the_naive_count_on_many_samples():
    trace = make_trace(150, num_exits=6, noise=1.5)
    assert measure_overthinking(trace).destructive > 0.05
    check(trace)


def test_without_asked_shares_there_is_no_nominal_cost():
    trace = replace(make_trace(20), costs=reference.make_costs(4, nominal=False))
    assert measure_overthinking(trace).oracle_cost_nominal is None
    check(trace)


def test_shares_are_exact():
    found = measure_overthinking(replace(hand_trace(), labels=torch.tensor([0, 0, 1, 0])))
    assert found.destructive_of_errors == 2 / 3


def test_one_exit_overthinks_nothing():
    found = measure_overthinking(hand_trace().select_exits([2]))
    assert (found.wasteful, found.destructive, found.oracle_cost, found.oracle_cost_nominal) == (0.0, 0.0, 1.0, 1.0)
    assert found.accuracy == found.cumulative == found.first_correct == (0.5,)


def test_no_errors_have_no_destructive_share():
    found = measure_overthinking(hand_trace().select(torch.tensor([0, 1])))
    assert (found.accuracy[-1], found.destructive_of_errors) == (1.0, 0.0)


def test_rows():
    assert FOUND.rows()[0] == {"exit": 0, "accuracy": 0.5, "cumulative": 0.5, "first correct": 0.5, "destructive": 0.25}
    assert [row["first correct"] for row in FOUND.rows()] == [0.5, 0.25, 0.0]
    assert json.loads(json.dumps(FOUND.rows())) == FOUND.rows()


def test_to_dict_is_json():
    values = json.loads(json.dumps(FOUND.to_dict()))
    assert values["cumulative"] == [0.5, 0.75, 0.75]
    assert values["destructive"] == 0.25


def test_str():
    assert str(FOUND) == (
        "Of 4 samples, 75.0 % are right before the last exit (50.0 % stay right). An oracle that leaves at the first "
        "right exit, else at the end, would spend 75.0 % of the plain network's cost.\n"
        "25.0 % are right before and wrong at the end, 50.0 % of all errors; accuracy 50.00 % at the end, "
        "75.00 % where some exit knows."
    )


def test_labels_are_needed():
    with pytest.raises(TraceError, match="needs labels"):
        measure_overthinking(replace(hand_trace(), labels=None))


def test_exits_have_one_width():
    trace = hand_trace()
    with pytest.raises(TraceError, match=r"one width; these give \(exit: outputs\) {0: 3, 1: 2, 2: 2}"):
        measure_overthinking(replace(trace, logits=(torch.zeros(4, 3), *trace.logits[1:])))
