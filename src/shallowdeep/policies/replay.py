"""What a policy would have done, decided on a Trace: no network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from shallowdeep.errors import TraceError
from shallowdeep.policies.rules import Confidence, ExitPolicy, exits_of
from shallowdeep.traces.trace import Trace


@dataclass(frozen=True)
class Decisions:
    """Where each sample left, what it was answered and what that cost.

    Attributes:
        exits: deepest exit computed, shape ``(n,)``.
        scores: what was answered, probabilities of shape ``(n, outputs)``.
        costs: of each sample, as a share of the plain backbone, shape ``(n,)``.
        labels: true classes, or ``None``.
        num_exits: of the network.
    """

    exits: Int[Tensor, " n"]
    scores: Float[Tensor, "n outputs"]
    costs: Float64[Tensor, " n"]
    labels: Int[Tensor, " n"] | None
    num_exits: int

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
    def cost(self) -> float:
        """Mean cost as a share of the plain backbone."""
        return self.costs.mean().item()

    @cached_property
    def exit_shares(self) -> list[float]:
        """Share of samples that leave at each exit."""
        return (torch.bincount(self.exits, minlength=self.num_exits) / len(self.exits)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Accuracy, cost and exits used, as JSON-able values."""
        accuracy = None if self.labels is None else self.accuracy
        return {
            "n": len(self.exits),
            "accuracy": accuracy,
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
                right = (self.predictions == self.labels)[here]
                row["accuracy"] = right.double().mean().item() if len(right) else None
            rows.append(row)
        return rows

    def __str__(self) -> str:
        accuracy = "" if self.labels is None else f"accuracy {100 * self.accuracy:.2f} %, "
        shares = " ".join(f"{100 * share:.0f}" for share in self.exit_shares)
        return f"{accuracy}cost {100 * self.cost:.1f} % of the plain network, leaving at each exit (%): {shares}"


def replay(trace: Trace, policy: ExitPolicy) -> Decisions:
    """Decide, for every sample, where a policy would have stopped it.

    Args:
        trace: of any split.
        policy: is shown the exits it looks at, in order; finished samples are carried along unchanged.

    Returns:
        One decision per sample, in the Trace's order.

    Raises:
        ConfigError: the policy looks at an exit that the Trace does not have.
        TraceError: the exits it looks at differ in width.
    """
    exits = exits_of(policy, trace.num_exits)
    _check_widths(trace, exits)
    n = len(trace)
    state = policy.start(n, trace.num_outputs)
    left, answers = torch.full((n,), -1), torch.zeros(n, trace.num_outputs)
    for exit in exits:
        verdict = policy.step(state, trace.logits[exit], exit)
        leaving = (left < 0) & (verdict.stop if exit != exits[-1] else torch.ones(n, dtype=torch.bool))
        left = torch.where(leaving, exit, left)
        answers = torch.where(leaving[:, None], verdict.scores, answers)
        state = verdict.state
    costs = trace.costs.relative(exits[:-1])[left]
    return Decisions(left, answers, costs, trace.labels, trace.num_exits)


def oracle(trace: Trace) -> Decisions:
    """The best any policy could do: leave at the first exit that is right, or at the end. Needs labels."""
    right = trace.correct
    first = torch.where(right.any(1), right.int().argmax(1), trace.num_exits - 1)
    stacked = torch.stack([logits.softmax(-1) for logits in trace.logits], dim=1)
    return Decisions(
        first,
        stacked[torch.arange(len(trace)), first],
        trace.costs.relative()[first],
        trace.labels,
        trace.num_exits,
    )


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
        feasible = torch.ones_like(self.cost).bool() if max_cost is None else self.cost <= max_cost
        if not feasible.any():
            return None
        best = self.accuracy[feasible].max()
        candidates = feasible & (self.accuracy == best)
        return int(torch.where(candidates, self.cost, torch.inf).argmin())

    def cheapest_above(self, min_accuracy: float) -> int | None:
        """Index of the lowest cost whose accuracy is at least ``min_accuracy``, or ``None``."""
        enough = self.accuracy >= min_accuracy
        return int(torch.where(enough, self.cost, torch.inf).argmin()) if enough.any() else None


def sweep(trace: Trace, family: Callable[[float], ExitPolicy], thresholds: Iterable[float]) -> Curve:
    """Accuracy and cost of a policy family over given thresholds, one replay each.

    Args:
        trace: with labels.
        family: threshold to policy, e.g. ``Patience``.
        thresholds: to try, any order.
    """
    tried = sorted(thresholds)
    decisions = [replay(trace, family(threshold)) for threshold in tried]
    accuracy = torch.tensor([d.accuracy for d in decisions], dtype=torch.float64)
    cost = torch.tensor([d.cost for d in decisions], dtype=torch.float64)
    return Curve(torch.tensor(tried, dtype=torch.float64), accuracy, cost, family)


def sweep_confidence(trace: Trace, *, exits: tuple[int, ...] | None = None, answer: Any = "last") -> Curve:
    """Accuracy and cost of ``Confidence`` at *every* threshold at which a decision changes.

    A sample moves on only when the threshold passes the largest confidence it has met so far, so that its
    path is a list of (confidence, next exit) events. All samples' events are sorted once and summed up;
    the network is not run, and no threshold is tried twice.

    Args:
        trace: with labels.
        exits: the internal exits to look at; ``None``: all.
        answer: as for ``Confidence``.

    Returns:
        One entry per distinct set of decisions. Each threshold lies half way between the two confidences
        that bound it, as far from a tie as it can be; the last one is above every confidence.

    Cite: Kaya, Hong & Dumitras, ICML 2019, section 5.1, where 11 thresholds are tried.
    """

    def family(threshold: float) -> Confidence:
        return Confidence(threshold, exits, answer)

    used = exits_of(family(1.0), trace.num_exits)
    confidence, right, last_right = _outcomes(trace, used, answer)
    cost = trace.costs.relative(used[:-1])[used]
    # The largest confidence met up to each internal exit; an exit is a stop on the way where it rises.
    peak = confidence[:, :-1].cummax(1).values
    before = torch.cat([torch.full_like(peak[:, :1], -1.0), peak[:, :-1]], dim=1)
    stop = torch.cat([peak > before, torch.ones_like(last_right[:, None])], dim=1)
    gain = torch.cat([right[:, :-1], last_right[:, None]], dim=1).double()
    # Step from each stop to the next one: what it changes, and the confidence above which it is taken.
    sample, exit = stop.nonzero(as_tuple=True)
    follows = (sample[1:] == sample[:-1]).nonzero(as_tuple=True)[0]
    here, there = (sample[follows], exit[follows]), (sample[follows + 1], exit[follows + 1])
    at, order = confidence[here].sort()
    d_right = (gain[there] - gain[here])[order].cumsum(0)
    d_cost = (cost[there[1]] - cost[here[1]])[order].cumsum(0)
    ends = torch.cat([at[1:] != at[:-1], torch.ones(min(len(at), 1), dtype=torch.bool)])
    first = stop.int().argmax(1, keepdim=True)
    n = len(trace)
    start_right = gain.gather(1, first).sum()
    start_cost = cost[first].sum()
    accuracy = torch.cat([start_right[None], start_right + d_right[ends]]) / n
    mean_cost = torch.cat([start_cost[None], start_cost + d_cost[ends]]) / n
    return Curve(_between(at[ends]), accuracy, mean_cost, family)


def _outcomes(trace: Trace, used: list[int], answer: str) -> tuple[Tensor, Tensor, Tensor]:
    confidence, right = trace.confidences[:, used], trace.correct[:, used]
    if answer == "last":
        return confidence, right, right[:, -1]
    most_confident = confidence.argmax(1, keepdim=True)
    return confidence, right, right.gather(1, most_confident)[:, 0]


def _between(values: Float[Tensor, " m"]) -> Float64[Tensor, " k"]:
    """Thresholds that tell rising values apart: below all, between each two, above all."""
    bounds = torch.cat([values.new_tensor([0.0]), values])
    middle = (bounds[:-1] + bounds[1:]) / 2
    # Neighbouring floats have no middle; the upper one itself still tells them apart, since `>=` stops there.
    middle = torch.where(middle > bounds[:-1], middle, bounds[1:])
    above = torch.nextafter(bounds[-1:], bounds.new_tensor([2.0]))
    top = torch.maximum(above, (bounds[-1:] + 1) / 2)
    return torch.cat([middle, torch.where(top > bounds[-1:], top, above)]).double()


def _check_widths(trace: Trace, exits: list[int]) -> None:
    widths = {trace.logits[exit].shape[1] for exit in exits}
    if len(widths) != 1:
        raise TraceError(f"the exits {exits} give {sorted(widths)} outputs; this policy needs one width.")
