import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import make_trace
from torch import Tensor, nn

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import RULES, Confidence, ExitPolicy, Patience, exits_of, policy_from_dict


@dataclass(frozen=True)
class Case:
    """One way to set up a rule."""

    kind: str
    make: Callable[..., ExitPolicy]  # of a setting, a number or a tensor, and exits=
    referee: Callable[..., reference.Rule]  # of a setting
    settings: tuple  # to try; the first: everyone leaves at the first exit, the last: nobody leaves early
    falls_back_to_last: bool = True  # who never stops is answered by the last exit

    @property
    def everyone_stops(self) -> ExitPolicy:
        return self.make(self.settings[0])

    @property
    def nobody_stops(self) -> ExitPolicy:
        return self.make(self.settings[-1])


# One line per rule; every law below runs on every line.
TABLE = [
    Case("confidence", Confidence, reference.confidence_exit, (0.0, 0.5, 0.7, 0.9, 1.0, 1.5)),
    Case(
        "confidence",
        partial(Confidence, answer="most_confident"),
        partial(reference.confidence_exit, answer="most_confident"),
        (0.0, 0.5, 0.7, 0.9, 1.0, 1.5),
        falls_back_to_last=False,
    ),
    Case("patience", Patience, reference.patience_exit, (0, 1, 2, 3, 50)),
]
EVERY_CASE = pytest.mark.parametrize("case", TABLE, ids=["confidence", "confidence-most-confident", "patience"])
TRACE = make_trace(60, num_exits=5, num_classes=4)


@pytest.fixture
def without_type_checks(monkeypatch):
    """As users run the package: the tests' own checks would speak before its messages do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_every_rule_is_in_the_table():
    assert {case.kind for case in TABLE} == set(RULES)


def same(decisions, other):
    return (
        torch.equal(decisions.exits, other.exits)
        and torch.equal(decisions.scores, other.scores)
        and torch.equal(decisions.costs, other.costs)
    )


def agrees(decisions, naive):
    return (
        decisions.exits.tolist() == [d.exit for d in naive]
        and decisions.scores.tolist() == [d.scores for d in naive]
        and decisions.costs.tolist() == pytest.approx([d.cost for d in naive], abs=1e-12)
    )


@EVERY_CASE
def test_the_settings_make_a_difference(case):
    shares = [tuple(replay(TRACE, case.make(setting)).exits.tolist()) for setting in case.settings]
    assert len(set(shares)) >= 4


@EVERY_CASE
@given(data=st.data())
def test_replay_is_the_naive_walk(case, data):
    trace = data.draw(reference.traces())
    exits = data.draw(reference.subsets(trace.num_exits))
    setting = data.draw(st.sampled_from(case.settings))
    naive = reference.decide(trace, case.referee(setting), exits)
    assert agrees(replay(trace, case.make(setting, exits=exits)), naive)


@EVERY_CASE
def test_replay_is_the_naive_walk_on_many_samples(case):
    for setting in case.settings:
        assert agrees(replay(TRACE, case.make(setting)), reference.decide(TRACE, case.referee(setting)))


@EVERY_CASE
def test_permuting_samples_permutes_decisions(case):
    order = torch.randperm(len(TRACE), generator=torch.Generator().manual_seed(1))
    for setting in case.settings:
        decisions, permuted = (replay(trace, case.make(setting)) for trace in (TRACE, TRACE.select(order)))
        assert torch.equal(permuted.exits, decisions.exits[order])
        assert torch.equal(permuted.scores, decisions.scores[order])
        assert torch.equal(permuted.costs, decisions.costs[order])


@EVERY_CASE
def test_dropping_finished_rows_decides_as_carrying_them_along(case):
    for setting in case.settings:
        policy, left, scores = case.make(setting), torch.full((len(TRACE),), -1), torch.zeros(len(TRACE), 4)
        state, rows = policy.start(len(TRACE), 4), torch.arange(len(TRACE))
        for exit, logits in enumerate(TRACE.logits):
            verdict = policy.step(state, logits[rows], exit)
            stop = verdict.stop | (exit == TRACE.num_exits - 1)
            left[rows[stop]], scores[rows[stop]] = exit, verdict.scores[stop]
            rows, state = rows[~stop], tuple(part[~stop] for part in verdict.state)
        decisions = replay(TRACE, policy)
        assert torch.equal(left, decisions.exits)
        assert torch.equal(scores, decisions.scores)


@EVERY_CASE
def test_state_has_a_row_per_sample(case):
    policy = case.make(case.settings[1])
    assert all(len(part) == 7 for part in policy.start(7, 4))
    assert all(len(part) == 60 for part in policy.step(policy.start(60, 4), TRACE.logits[0], 0).state)


@EVERY_CASE
def test_scores_are_probabilities(case):
    for setting in case.settings:
        torch.testing.assert_close(replay(TRACE, case.make(setting)).scores.sum(1), torch.ones(60))


@EVERY_CASE
@pytest.mark.parametrize("exits", [(), (0,), (3,), (1, 2), (0, 1, 3)])
def test_only_the_exits_looked_at_decide_and_cost(case, exits):
    shown = [*exits, 4]
    alone = TRACE.select_exits(shown)
    for setting in case.settings:
        decisions, lone = replay(TRACE, case.make(setting, exits=exits)), replay(alone, case.make(setting))
        assert torch.equal(decisions.exits, torch.tensor(shown)[lone.exits])
        assert torch.equal(decisions.scores, lone.scores)
        assert torch.equal(decisions.costs, lone.costs)


@EVERY_CASE
@pytest.mark.parametrize("exits", [None, (), (0, 2)])
def test_through_json_and_back(case, exits):
    for setting in case.settings:
        policy = case.make(setting, exits=exits)
        values = policy.to_dict()
        assert values["kind"] == case.kind
        assert json.loads(json.dumps(values)) == values
        assert policy_from_dict(values) == policy
        of_tensor = case.make(torch.tensor(setting, dtype=torch.float64), exits=exits)
        assert json.loads(json.dumps(of_tensor.to_dict())) == values


@EVERY_CASE
def test_numbers_of_numpy_become_plain_ones(case, without_type_checks):
    for setting in case.settings:
        number = np.asarray(setting, np.float32 if isinstance(setting, float) else np.int64)[()]
        policy = case.make(number, exits=(np.int64(0), np.int64(2)))
        assert policy == case.make(number.item(), exits=(0, 2))
        assert policy_from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@EVERY_CASE
def test_limits(case):
    assert same(replay(TRACE, case.everyone_stops), replay(TRACE, case.make(case.settings[0], exits=(0,))))
    assert set(replay(TRACE, case.everyone_stops).exits.tolist()) == {0}
    nobody = replay(TRACE, case.nobody_stops)
    assert set(nobody.exits.tolist()) == {4}
    assert nobody.costs.tolist() == [TRACE.costs.relative()[-1]] * 60
    is_last = torch.equal(nobody.scores, TRACE.logits[-1].softmax(-1))
    assert is_last == case.falls_back_to_last
    plain = replay(TRACE, case.make(case.settings[-1], exits=()))
    assert torch.equal(plain.predictions, TRACE.predictions[:, -1])
    assert plain.costs.tolist() == [1.0] * 60


@EVERY_CASE
def test_one_exit_is_the_plain_network(case):
    alone = TRACE.select_exits([4])
    for setting in case.settings:
        decisions = replay(alone, case.make(setting))
        assert torch.equal(decisions.predictions, TRACE.predictions[:, -1])
        assert decisions.cost == 1.0


@EVERY_CASE
def test_replay_leaves_the_trace_alone(case):
    before = [logits.clone() for logits in TRACE.logits]
    replay(TRACE, case.make(case.settings[2]))
    assert all(torch.equal(now, then) for now, then in zip(TRACE.logits, before, strict=True))


class Walk(nn.Module):
    """The whole of a replay as one graph, the setting an input."""

    def __init__(self, make: Callable[..., ExitPolicy]):
        super().__init__()
        self.make = make

    def forward(self, setting: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        policy, (rows, outputs) = self.make(setting), logits[0].shape
        state = policy.start(rows, outputs)
        left, scores = logits[0].new_full((rows,), -1), torch.zeros_like(logits[0])
        for exit, seen in enumerate(logits):
            verdict = policy.step(state, seen, exit)
            leaving = (left < 0) & (verdict.stop | (exit == len(logits) - 1))
            left = torch.where(leaving, exit, left)
            scores, state = torch.where(leaving[:, None], verdict.scores, scores), verdict.state
        return left, scores


def check_graph(case: Case, *, strict: bool) -> None:
    """The exported walk decides as replay does, at other settings and batch sizes too."""
    setting, logits = torch.tensor(case.settings[1]), list(TRACE.logits)
    shapes = {"setting": None, "logits": [{0: torch.export.Dim("n")}] * len(logits)}
    exported = torch.export.export(Walk(case.make), (setting, logits), dynamic_shapes=shapes, strict=strict)
    walk = exported.module()
    for setting in case.settings:
        for rows in (60, 7, 2):
            left, scores = walk(torch.tensor(setting), [seen[:rows] for seen in logits])
            decisions = replay(TRACE.select(torch.arange(rows)), case.make(setting))
            assert torch.equal(left, decisions.exits)
            assert torch.equal(scores, decisions.scores)


@EVERY_CASE
def test_policies_become_part_of_a_graph(case, without_type_checks):  # which know no symbolic int
    check_graph(case, strict=False)


@pytest.mark.slow
def test_policies_become_part_of_a_graph_in_strict_mode():
    """In a process of its own: Dynamo does not see through the type checks put on the package here."""
    here = Path(__file__)
    code = "import test_rules as t\nfor case in t.TABLE: t.check_graph(case, strict=True)\nprint(len(t.TABLE))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, here.parents[:2]))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, f"{len(TABLE)}\n"), run.stderr


def test_who_stops_nowhere_pays_full_depth_whichever_exit_answers():
    policy = Confidence(1.5, answer="most_confident")
    decisions = replay(TRACE, policy)
    surest = TRACE.confidences.argmax(1)
    assert (surest < 4).sum() > 5  # an earlier exit does answer
    assert torch.equal(decisions.predictions, TRACE.predictions[torch.arange(60), surest])
    assert decisions.costs.tolist() == [TRACE.costs.relative()[-1]] * 60


@pytest.mark.parametrize("threshold", [-0.1, 2.5, 90.0, math.nan, math.inf])
def test_thresholds_are_probabilities(threshold):
    with pytest.raises(ConfigError, match=rf"between 0 and 1 .*, got {threshold}\."):
        Confidence(threshold)


@pytest.mark.parametrize("patience", [-1, 1.5, math.nan, math.inf])
def test_patience_is_a_whole_number(patience, without_type_checks):
    with pytest.raises(ConfigError, match=rf"whole number of exits, 0 or more, got {patience}\."):
        Patience(patience)


def test_answers_have_names(without_type_checks):
    with pytest.raises(ConfigError, match="'last' or 'most_confident', got 'first'"):
        Confidence(0.5, answer="first")


@pytest.mark.parametrize("exits", [(2, 1), (1, 1), (-1, 0)])
@EVERY_CASE
def test_exits_rise(case, exits):
    with pytest.raises(ConfigError, match=rf"each once, got \({exits[0]}, {exits[1]}\)"):
        case.make(case.settings[0], exits=exits)


def test_exits_of_a_policy():
    assert exits_of(Patience(1), 4) == [0, 1, 2, 3]
    assert exits_of(Patience(1, (1,)), 4) == [1, 3]
    assert exits_of(Patience(1, ()), 4) == [3]
    with pytest.raises(ConfigError, match=r"looks at exits \[0, 3\]; this network's internal exits are \[0, 1, 2\]"):
        exits_of(Patience(1, (0, 3)), 4)
    with pytest.raises(ConfigError, match=r"looks at exits \[0\]; this network's internal exits are \[\]"):
        exits_of(Patience(1, (0,)), 1)


def test_unknown_rules_and_settings(without_type_checks):
    with pytest.raises(UnknownName, match=r"no policy 'confidense'. Did you mean 'confidence'\? Known: confidence, "):
        policy_from_dict({"kind": "confidense", "threshold": 0.5})
    with pytest.raises(UnknownName, match="no policy 'None'"):
        policy_from_dict({"threshold": 0.5})
    with pytest.raises(ConfigError, match=r"'patience': 2.* are no confidence policy: .*unexpected keyword"):
        policy_from_dict({"kind": "confidence", "threshold": 0.5, "patience": 2})
    with pytest.raises(ConfigError, match=r"'exits': 3.* are no patience policy: .*in a list, got 3"):
        policy_from_dict({"kind": "patience", "patience": 2, "exits": 3})
