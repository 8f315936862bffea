"""The paper's table: accuracy within a quarter, a half and three quarters of the plain network's cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shallowdeep.errors import TraceError
from shallowdeep.policies.calibrate import refuse_test, sweep_rule
from shallowdeep.policies.replay import Curve, replay
from shallowdeep.traces.trace import Trace

BUDGETS = (0.25, 0.50, 0.75, None)


@dataclass(frozen=True)
class BudgetRow:
    """One column of the paper's table.

    Attributes:
        budget: mean cost allowed, as a share of the plain network; ``None``: any (the paper's "Max").
        threshold: chosen on validation: the most accurate within the budget; ``None``: none is cheap enough.
        val_accuracy: at that threshold, on validation.
        val_cost: at that threshold, on validation.
        accuracy: at that threshold, on test.
        cost: realised on test; it may pass the budget a little.
        test_chosen_accuracy: of the threshold that is best on test itself, as the paper's code chooses;
            no fair figure, given for comparison.
        test_chosen_cost: its cost on test.
    """

    budget: float | None
    threshold: float | None
    val_accuracy: float | None
    val_cost: float | None
    accuracy: float | None
    cost: float | None
    test_chosen_accuracy: float | None
    test_chosen_cost: float | None


@dataclass(frozen=True)
class Budgets:
    """Accuracy within budgets, thresholds chosen on validation.

    Attributes:
        table: a row per budget.
        last_accuracy: of the last exit on test, at the full cost.
        n: test samples.
    """

    table: tuple[BudgetRow, ...]
    last_accuracy: float
    n: int

    def rows(self) -> list[dict[str, Any]]:
        """One row per budget."""
        return [
            {
                "budget": "max" if row.budget is None else f"≤ {100 * row.budget:.0f} %",
                "threshold": row.threshold,
                "accuracy": row.accuracy,
                "cost": row.cost,
                "val accuracy": row.val_accuracy,
                "val cost": row.val_cost,
                "test-chosen accuracy": row.test_chosen_accuracy,
                "test-chosen cost": row.test_chosen_cost,
            }
            for row in self.table
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"Last exit: {100 * self.last_accuracy:.2f} % on {self.n} samples."]
        for row in self.table:
            name = "any cost" if row.budget is None else f"at most {100 * row.budget:.0f} % of the cost"
            if row.accuracy is None or row.cost is None:
                lines.append(f"{name}: no threshold is that cheap.")
            else:
                lines.append(f"{name}: {100 * row.accuracy:.2f} % at {100 * row.cost:.1f} %.")
        return "\n".join(lines)


def measure_budgets(
    val: Trace,
    test: Trace,
    *,
    budgets: Sequence[float | None] = BUDGETS,
    rule: str = "confidence",
    answer: str = "last",
) -> Budgets:
    """Accuracy within budgets: thresholds from validation, figures from test.

    Args:
        val: Trace that chooses.
        test: Trace that is reported.
        budgets: shares of the plain network's cost; ``None``: any cost.
        rule: ``"confidence"`` or ``"patience"``.
        answer: as for ``Confidence``.

    Raises:
        CalibrationError: thresholds would be chosen on the test split.
        TraceError: there are no labels, or the two Traces are of different networks.

    Deviation: the paper's code chooses among 11 thresholds on the test split; that choice, among all
    thresholds, stands beside ours by name.
    Cite: Kaya, Hong & Dumitras, ICML 2019, table 3.
    """
    refuse_test(val)
    if val.costs != test.costs:
        raise TraceError("the validation Trace is of another network than the test Trace.")
    on_val, on_test = sweep_rule(val, rule, answer=answer), sweep_rule(test, rule, answer=answer)
    table = []
    for budget in budgets:
        threshold, val_accuracy, val_cost = _best_within(on_val, budget)
        _, test_chosen_accuracy, test_chosen_cost = _best_within(on_test, budget)
        decisions = None if threshold is None else replay(test, on_val.policy(threshold))
        table.append(
            BudgetRow(
                budget=budget,
                threshold=threshold,
                val_accuracy=val_accuracy,
                val_cost=val_cost,
                accuracy=None if decisions is None else decisions.accuracy,
                cost=None if decisions is None else decisions.cost,
                test_chosen_accuracy=test_chosen_accuracy,
                test_chosen_cost=test_chosen_cost,
            )
        )
    return Budgets(tuple(table), test.correct[:, -1].double().mean().item(), len(test))


def _best_within(curve: Curve, budget: float | None) -> tuple[float, float, float] | tuple[None, None, None]:
    """Threshold, accuracy and cost of a budget's choice."""
    chosen = curve.best_within(budget)
    if chosen is None:
        return None, None, None
    return curve.thresholds[chosen].item(), curve.accuracy[chosen].item(), curve.cost[chosen].item()
