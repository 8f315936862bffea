"""The threshold that the page starts at: where it comes from, and what it does."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shallowdeep.analysis.budgets import Budgets
from shallowdeep.policies.replay import Decisions, replay
from shallowdeep.policies.rules import Confidence, ExitPolicy
from shallowdeep.report.missing import Missing, attempt
from shallowdeep.runs.run import Run
from shallowdeep.storage import read_json
from shallowdeep.traces.trace import Trace

BUDGET = 0.5
OPTIONS = {"max_cost", "max_accuracy_drop", "min_agreement", "reference", "original", "rule", "answer"}
"""Of ``shallowdeep calibrate``."""
NOBODY = 1.01
"""A threshold above every confidence: nobody leaves early."""


@dataclass(frozen=True)
class Start:
    """Where the threshold slider stands when the page opens.

    Attributes:
        policy: of the confidence family; its exits and answer hold for the slider everywhere.
        source: who chose the threshold, on what data, as the page says it.
        chosen: whether anybody did.
        decisions: of that policy on the samples that are reported.
    """

    policy: Confidence
    source: str
    chosen: bool
    decisions: Decisions

    @property
    def threshold(self) -> float:
        """Of the policy."""
        return float(self.policy.threshold)


@dataclass(frozen=True)
class OtherPolicy:
    """A run's policy that has no confidence threshold, as one point beside the curve.

    Attributes:
        policy: the run's own.
        decisions: of it on the samples that are reported.
    """

    policy: ExitPolicy
    decisions: Decisions


def find_start(test: Trace, policy: ExitPolicy | Missing, source: str, budgets: Budgets | Missing) -> Start:
    """The run's own threshold; else that of half the cost; else one at which nobody leaves early.

    Args:
        test: with labels.
        policy: of the run.
        source: where that comes from.
        budgets: with thresholds from validation data.
    """
    if isinstance(policy, Confidence):
        return Start(policy, source, True, replay(test, policy))
    found = None if isinstance(budgets, Missing) else _of_half(budgets)
    if found is None:
        nobody = Confidence(NOBODY)
        return Start(nobody, "No threshold was chosen for this run: everyone goes on to the end.", False,
                     replay(test, nobody))  # fmt: skip
    chosen = Confidence(found)
    words = f"Chosen on validation data: the most accurate at no more than {100 * BUDGET:.0f} % of the cost."
    return Start(chosen, words, True, replay(test, chosen))


def _of_half(budgets: Budgets) -> float | None:
    rows = [row for row in budgets.table if row.budget == BUDGET]
    return rows[0].threshold if rows and isinstance(rows[0].threshold, float) else None


def options_of(calibration: Mapping[str, Any]) -> list[str]:
    """What a calibration was asked for, as options of the command; none where it has no such, or the file is older.

    >>> options_of({"demand": {"max_cost": 0.5, "rule": "confidence", "original": None}})
    ['--max-cost', '0.5', '--rule', 'confidence']
    >>> options_of({"demand": {"max_cost": 0.5, "exits": [0, 1]}})
    []
    """
    demand = calibration.get("demand")
    asked = {name: value for name, value in demand.items() if value is not None} if isinstance(demand, Mapping) else {}
    if not asked.keys() <= OPTIONS:
        return []
    return [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def policy_of(run: Run) -> tuple[ExitPolicy | Missing, str]:
    """A run's policy, and where it comes from, as its folder tells."""
    policy = attempt(run.policy)
    path = run.folder / "results" / "calibration.json"
    if isinstance(policy, Missing) or not path.exists():
        return policy, "From the run's policy.json; the folder does not say what data chose it."
    calibration = attempt(lambda: read_json(path))
    if isinstance(calibration, dict) and calibration.get("policy") == policy.to_dict():
        demand = shlex.join(options_of(calibration))
        return policy, f"The run's own policy, chosen on validation data{f' ({demand})' if demand else ''}."
    return policy, "From the run's policy.json, which was changed after the last calibration."
