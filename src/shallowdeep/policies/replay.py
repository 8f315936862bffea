"""What a policy would have done, decided on a Trace: no network runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from shallowdeep.errors import TraceError
from shallowdeep.policies.rules import Confidence, ExitPolicy, exits_of
from shallowdeep.traces.trace import Trace, refuse_label_sets


@dataclass(frozen=True)
class Decisions:
    """Where each sample left, what it was answered and what that cost.

    Attributes:
        exits: deepest exit computed, shape ``(n,)``.
        scores: what was answered, probabilities of shape ``(n, outputs)``.
        costs: of each sample, as a share of the plain backbone, shape ``(n,)``.
        labels: true classes, or ``None``.
        num_exits: of the network.
        last: the last exit's answers, shape ``(n,)``.
    """

    exits: Int[Tensor, " n"]
    scores: Float[Tensor, "n outputs"]
    costs: Float64[Tensor, " n"]
    labels: Int[Tensor, " n"] | None
    num_exits: int
    last: Int[Tensor, " n"]

    @cached_property
    def predictions(self) -> Int[Tensor, " n"]:
        """The answered class."""
        return self.scores.argmax(-1)

    @property
    def accuracy(self) -> float:
        """Share of right answers; a TraceError without labels."""
        if self.labels is None:
            raise TraceError("accuracy needs labels, and the Trace has none.")
        return (self.predictions == self.labels).double().mean().item()

    @property
    def agreement(self) -> float:
        """Share of answers that are the last exit's own; needs no labels."""
        return (self.predictions == self.last).double().mean().item()

    @property
    def cost(self) -> float:
        """Mean cost as a share of the plain backbone."""
        return self.costs.mean().item()

    @cached_property
    def exit_shares(self) -> list[float]:
        """Share of samples that leave at each exit."""
        return (torch.bincount(self.exits, minlength=self.num_exits).double() / len(self.exits)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Accuracy, agreement, cost and exits used, as JSON-able values."""
        accuracy = None if self.labels is None else self.accuracy
        return {
            "n": len(self.exits),
            "accuracy": accuracy,
            "agreement": self.agreement,
            "cost": self.cost,
            "exit_shares": self.exit_shares,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per exit: how many leave there, and how often they are right."""
        rows = []
        for exit, share in enumerate(self.exit_shares):
            here = self.exits == exit
            row: dict[str, Any] = {"exit": exit, "share": share}
            if self.labels is not None:
                row["accuracy"] = _share((self.predictions == self.labels)[here])
            row["agreement"] = _share((self.predictions == self.last)[here])
            rows.append(row)
        return rows

    def __str__(self) -> str:
        accuracy = "" if self.labels is None else f"accuracy {100 * self.accuracy:.2f} %, "
        shares = " ".join(f"{100 * share:.0f}" for share in self.exit_shares)
        return (
            f"{accuracy}agreement with the last exit {100 * self.agreement:.2f} %, "
            f"cost {100 * self.cost:.1f} % of the plain network, leaving at each exit (%): {shares}"
        )


def _share(right: Tensor) -> float | None:
    return right.double().mean().item() if len(right) else None


def replay(trace: Trace, policy: ExitPolicy) -> Decisions:
    """Decide, for every sample, where a policy would have stopped it.

    Args:
        trace: of any split.
        policy: is shown the exits it looks at, in order; finished samples are carried along unchanged.

    Returns:
        One decision per sample, in the Trace's order.

    Raises:
        ConfigError: the policy looks at an exit that the Trace does not have.
        TraceError: the exits it looks at differ in width, or their columns hold several label sets.
    """
    exits = exits_of(policy, trace.num_exits)
    refuse_label_sets(trace)
    _check_widths(trace, exits)
    n = len(trace)
    state = policy.start(n, trace.num_outputs)
    left, answers = torch.full((n,), -1), torch.zeros(n, trace.num_outputs)
    for exit in exits:
        verdict = policy.step(state, trace.logits[exit], exit)
        leaving = (left < 0) & (verdict.stop | (exit == exits[-1]))
        left = torch.where(leaving, exit, left)
        answers = torch.where(leaving[:, None], verdict.scores, answers)
        state = verdict.state
    costs = trace.costs.relative(exits[:-1])[left]
    return Decisions(left, answers, costs, trace.labels, trace.num_exits, _last_answers(trace))


def _last_answers(trace: Trace) -> Int[Tensor, " n"]:
    return trace.logits[-1].softmax(-1).argmax(-1)


def oracle(trace: Trace) -> Decisions:
    """As accurate as any policy can be: leave at the first exit that is right, or at the end.

    Raises:
        TraceError: the Trace has no labels, or its exits differ in width.
    """
    _check_widths(trace, range(trace.num_exits))
    right = trace.correct
    first = torch.where(right.any(1), right.int().argmax(1), trace.num_exits - 1)
    stacked = torch.stack([logits.softmax(-1) for logits in trace.logits], dim=1)
    return Decisions(
        first,
        stacked[torch.arange(len(trace)), first],
        trace.costs.relative()[first],
        trace.labels,
        trace.num_exits,
        _last_answers(trace),
    )


ROUNDING = 1e-9
"""By how much a mean of costs or a share of samples may miss a demand: sums in another order round otherwise."""


@dataclass(frozen=True)
class Curve:
    """Accuracy and cost of a policy family, one entry per threshold, rising.

    Attributes:
        thresholds: of the policies.
        accuracy: in [0, 1].
        cost: mean, as a share of the plain backbone (1.0: no early exit and no internal classifiers).
        policy: threshold to policy.
    """

    thresholds: Float64[Tensor, " m"]
    accuracy: Float64[Tensor, " m"]
    cost: Float64[Tensor, " m"]
    policy: Callable[[float], ExitPolicy]

    def best_within(self, max_cost: float | None) -> int | None:
        """Index of the highest accuracy whose cost is at most ``max_cost`` (``None``: any cost).

        Of equally accurate thresholds the cheapest; ``None`` where no threshold is cheap enough.
        """
        limit = math.inf if max_cost is None else max_cost + ROUNDING
        accuracy, cost = self.accuracy.tolist(), self.cost.tolist()
        within = (i for i in range(len(cost)) if cost[i] <= limit)
        return max(within, key=lambda i: (accuracy[i], -cost[i]), default=None)

    def cheapest_above(self, min_accuracy: float) -> int | None:
        """Index of the lowest cost whose accuracy is at least ``min_accuracy``, or ``None``.

        Of equally cheap thresholds the most accurate.
        """
        accuracy, cost = self.accuracy.tolist(), self.cost.tolist()
        enough = (i for i in range(len(cost)) if accuracy[i] >= min_accuracy - ROUNDING)
        return min(enough, key=lambda i: (cost[i], -accuracy[i]), default=None)


def sweep(trace: Trace, family: Callable[[float], ExitPolicy], thresholds: Iterable[float]) -> Curve:
    """Accuracy and cost of a policy family over given thresholds, one replay each.

    Args:
        trace: with labels.
        family: threshold to policy, e.g. ``Patience``.
        thresholds: to try, any order.

    Returns:
        One entry per threshold, rising.

    Raises:
        TraceError: the Trace has no labels.
    """
    tried = sorted(thresholds)
    decisions = [replay(trace, family(threshold)) for threshold in tried]
    accuracy = torch.tensor([d.accuracy for d in decisions], dtype=torch.float64)
    cost = torch.tensor([d.cost for d in decisions], dtype=torch.float64)
    return Curve(torch.tensor(tried, dtype=torch.float64), accuracy, cost, family)


def sweep_confidence(trace: Trace, *, exits: tuple[int, ...] | None = None, answer: Any = "last") -> Curve:
    """Accuracy and cost of ``Confidence`` at *every* threshold at which a decision changes.

    A sample moves on from an exit once the threshold passes the largest confidence it has met so far. What
    those moves change is summed up per confidence, then along the confidences: the network is not run, and
    no threshold is tried twice.

    Args:
        trace: with labels.
        exits: the internal exits to look at; ``None``: all.
        answer: as for ``Confidence``.

    Returns:
        One entry per distinct set of decisions. Each threshold lies half way between the two confidences
        that bound it, as far from a tie as it can be; the last one is above every confidence.

    Raises:
        ConfigError: there is no such exit or answer.
        TraceError: the Trace has no labels, or the exits differ in width.

    Cite: Kaya, Hong & Dumitras, ICML 2019, section 5.1, where 11 thresholds are tried.
    """

    def family(threshold: float) -> Confidence:
        return Confidence(threshold, exits, answer)

    used = exits_of(family(1.0), trace.num_exits)
    _check_widths(trace, used)
    confidence, right = trace.confidences[:, used], trace.correct[:, used].double()
    if answer == "most_confident":
        right[:, -1:] = right.gather(1, confidence.argmax(1, keepdim=True))
    cost = trace.costs.relative(used[:-1])[used].expand_as(right)
    # Above its passed-at confidence, a sample no longer leaves at this exit but goes to the next one.
    passed_at, place = confidence[:, :-1].cummax(1).values.unique(return_inverse=True)
    return Curve(_between(passed_at), _means(right, place), _means(cost, place), family)


def _means(values: Float64[Tensor, "n exits"], place: Int[Tensor, "n internal"]) -> Float64[Tensor, " m"]:
    """Mean over samples of each one's value at the exit it leaves at, threshold by threshold.

    Args:
        values: of each sample at each exit.
        place: number of the threshold below which the sample leaves there or earlier.
    """
    moves = place.flatten().bincount(values.diff(dim=1).flatten())
    return torch.cat([values[:, :1].sum(0), moves]).cumsum(0) / len(values)


def _between(values: Float[Tensor, " m"]) -> Float64[Tensor, " k"]:
    """Thresholds that tell rising values apart: below all, between each two, above all."""
    bounds = torch.cat([values.new_zeros(1), values])
    middle = (bounds[:-1] + bounds[1:]) / 2
    # Neighbouring floats have no middle; the upper one itself still tells them apart, since `>=` stops there.
    middle = torch.where(middle > bounds[:-1], middle, bounds[1:])
    above = torch.nextafter(bounds[-1:], bounds.new_tensor([2.0]))
    return torch.cat([middle, torch.maximum(above, (bounds[-1:] + 1) / 2)]).double()


def _check_widths(trace: Trace, exits: Iterable[int]) -> None:
    widths = {exit: trace.logits[exit].shape[1] for exit in exits}
    if len(set(widths.values())) != 1:
        raise TraceError(f"answers need exits of one width; these give (exit: outputs) {widths}.")
