"""How well a score finds what it should: ROC curves, and the errors left where the suspicious are set aside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from shallowdeep.policies.replay import ROUNDING

MAX_POINTS = 101


@dataclass(frozen=True)
class Roc:
    """Points of a ROC curve, from (0, 0) to (1, 1), to be joined by straight lines.

    Attributes:
        fpr: share of negatives that raise an alarm, rising.
        tpr: share of positives that do, rising.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


def auroc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Probability that a random positive scores above a random negative; ties count one half.

    >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, False, True, True]))
    0.875
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    mean_rank = (counts.cumsum(0) - (counts - 1).double() / 2)[place]
    num_positive, num_negative = positive.sum().item(), (~positive).sum().item()
    ranks = mean_rank[positive].sum().item()
    return (ranks - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def roc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"], max_points: int = MAX_POINTS) -> Roc:
    """The ROC curve of an alarm at every score there is, the highest first.

    Args:
        scores: higher is more suspicious; equal ones raise the alarm together.
        positive: what the alarm is for; there are some, and some others.
        max_points: of a curve with more corners only so many are kept, in even steps along it, both ends included.

    >>> roc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, False, True, True]))
    Roc(fpr=(0.0, 0.0, 0.5, 1.0), tpr=(0.0, 0.5, 1.0, 1.0))
    """
    values, place = scores.unique(return_inverse=True)

    def share(which: Bool[Tensor, " n"]) -> Float64[Tensor, " corners"]:
        alarms = place[which].bincount(minlength=len(values)).flip(0).cumsum(0).double()
        return torch.cat([alarms.new_zeros(1), alarms / alarms[-1]])

    fpr, tpr = share(~positive), share(positive)
    kept = torch.arange(len(fpr)) if len(fpr) <= max_points else _even_steps(fpr + tpr, max_points)
    return Roc(tuple(fpr[kept].tolist()), tuple(tpr[kept].tolist()))


def risk_coverage(scores: Float[Tensor, " n"], wrong: Bool[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Share of wrong answers among the ``k`` least suspicious samples, for each ``k`` from 1 to ``n``.

    Where ``k`` parts samples of equal score, it is the mean over all their orders: each of them counts with the
    share of wrong answers among them. The area under the curve (AURC) is the mean of what is returned.

    Args:
        scores: higher is more suspicious.
        wrong: which answers are wrong.

    Cite: Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.

    >>> risk_coverage(torch.tensor([0.2, 0.1, 0.2, 0.9]), torch.tensor([True, False, False, True])).tolist()
    [0.0, 0.25, 0.3333333333333333, 0.5]
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    errors = place.bincount(wrong.double(), minlength=len(counts))
    expected = (errors / counts).repeat_interleave(counts)
    return expected.cumsum(0) / torch.arange(1, len(scores) + 1)


def risk_at(risks: Float64[Tensor, " n"], coverage: float) -> float:
    """Of a risk-coverage curve, the risk where at least that share of the samples is answered.

    >>> risk_at(torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64), 0.5)
    0.25
    """
    answered = max(1, math.ceil(coverage * len(risks) - ROUNDING))
    return risks[answered - 1].item()


def _even_steps(positions: Float64[Tensor, " m"], count: int) -> Tensor:
    """Indices of the rising positions nearest to ``count`` even steps from the first to the last."""
    wanted = torch.linspace(positions[0].item(), positions[-1].item(), count, dtype=torch.float64)
    above = torch.searchsorted(positions, wanted).clamp(1, len(positions) - 1)
    nearer_below = wanted - positions[above - 1] <= positions[above] - wanted
    return torch.where(nearer_below, above - 1, above).unique()
