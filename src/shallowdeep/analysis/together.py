"""Every analysis that recorded splits allow, and what all of their results have in common."""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

from shallowdeep.analysis.budgets import measure_budgets
from shallowdeep.analysis.confusion import measure_confusion
from shallowdeep.analysis.overthinking import measure_overthinking
from shallowdeep.errors import TraceError
from shallowdeep.traces.trace import Trace


@runtime_checkable
class Result(Protocol):
    """What every analysis returns."""

    def rows(self) -> list[dict[str, Any]]:
        """As a table."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        ...


def analyze_traces(test: Trace, val: Trace | None = None, train: Trace | None = None) -> dict[str, Result]:
    """Every analysis that some recorded splits allow.

    Args:
        test: what is reported.
        val: what thresholds are chosen on, for budgets; ``None``: they are left out.
        train: whose confusion gives mean and spread, for confusion; ``None``: it is left out.
    """
    found: dict[str, Result] = {"overthinking": measure_overthinking(test)}
    if val is not None:
        found["budgets"] = measure_budgets(val, test)
    if train is not None:
        try:
            found["confusion"] = measure_confusion(test, train)
        except TraceError as error:  # a network without errors is no reason to lose the rest
            warnings.warn(f"confusion is not measured: {error}", stacklevel=2)
    return found
