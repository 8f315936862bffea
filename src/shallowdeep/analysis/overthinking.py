"""Overthinking: where a network had the right answer before its end, and where it lost it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from shallowdeep.analysis.shares import share, shares
from shallowdeep.policies.replay import oracle
from shallowdeep.traces.trace import Trace


@dataclass(frozen=True)
class Overthinking:
    """How much a network overthinks on one split; all shares in [0, 1].

    Attributes:
        n: samples.
        accuracy: of each exit, the last included.
        cumulative: share of samples that this exit or an earlier one gets right.
        first_correct: share of samples that each exit is the first to get right.
        wasteful: share of samples that some exit before the last gets right: all computation after it was
            wasted.
        wasteful_and_right: of these, only those that the last exit gets right too.
        destructive: share of samples that an earlier exit gets right and the last one wrong.
        destructive_of_errors: the same as a share of the last exit's errors; 0 where it makes none.
        destructive_at: share of samples that each exit gets right and the last one wrong.
        oracle_cost: mean cost of leaving at the first right exit (or at the end), heads included.
        oracle_cost_nominal: the same with the shares the exits were asked to sit at, as the paper's code
            charges; samples no internal exit gets right cost 1. ``None`` where taps were given by name.
    """

    n: int
    accuracy: tuple[float, ...]
    cumulative: tuple[float, ...]
    first_correct: tuple[float, ...]
    wasteful: float
    wasteful_and_right: float
    destructive: float
    destructive_of_errors: float
    destructive_at: tuple[float, ...]
    oracle_cost: float
    oracle_cost_nominal: float | None

    def rows(self) -> list[dict[str, Any]]:
        """One row per exit."""
        columns = zip(self.accuracy, self.cumulative, self.first_correct, self.destructive_at, strict=True)
        return [
            {"exit": i, "accuracy": a, "cumulative": c, "first correct": f, "destructive": d}
            for i, (a, c, f, d) in enumerate(columns)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"Of {self.n} samples, {100 * self.wasteful:.1f} % are right before the last exit "
            f"({100 * self.wasteful_and_right:.1f} % stay right). An oracle that leaves at the first right exit, else "
            f"at the end, would spend {100 * self.oracle_cost:.1f} % of the plain network's cost.\n"
            f"{100 * self.destructive:.1f} % are right before and wrong at the end, "
            f"{100 * self.destructive_of_errors:.1f} % of all errors; "
            f"accuracy {100 * self.accuracy[-1]:.2f} % at the end, "
            f"{100 * self.cumulative[-1]:.2f} % where some exit knows."
        )


def measure_overthinking(trace: Trace) -> Overthinking:
    """Wasteful and destructive overthinking of a network on one split.

    Args:
        trace: with labels.

    Raises:
        TraceError: the Trace has no labels, or its exits differ in width.

    Deviation: the paper's code charges nominal costs alone, out of a fixed 10,000 samples; both costs are
    given here, out of the samples there are.
    Cite: Kaya, Hong & Dumitras, ICML 2019, section 5.
    """
    correct = trace.correct
    internal, last = correct[:, :-1], correct[:, -1]
    before = internal.any(1)
    known = correct.int().cummax(1).values.bool()
    first = known & ~torch.cat([torch.zeros_like(known[:, :1]), known[:, :-1]], dim=1)
    return Overthinking(
        n=len(trace),
        accuracy=shares(correct),
        cumulative=shares(known),
        first_correct=shares(first),
        wasteful=share(before),
        wasteful_and_right=share(before & last),
        destructive=share(before & ~last),
        destructive_of_errors=share(before[~last]) if not last.all() else 0.0,
        destructive_at=shares(correct & ~last[:, None]),
        oracle_cost=oracle(trace).cost,
        oracle_cost_nominal=_nominal_cost(trace, first),
    )


def _nominal_cost(trace: Trace, first: torch.Tensor) -> float | None:
    if trace.costs.nominal is None:
        return None
    shares = first[:, :-1].double().mean(0)
    nominal = torch.tensor(trace.costs.nominal[:-1], dtype=torch.float64)
    return (shares @ nominal + (1 - shares.sum())).item()
