"""Whether confusion gives wrong answers away: histograms, ROC and risk-coverage curves, beside confidence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from shallowdeep.analysis.confusion import Confusion, confusion_scores, measure_confusion, usual_confusion
from shallowdeep.analysis.detection import Roc, risk_coverage, roc
from shallowdeep.traces.trace import Trace

BINS = 40
POINTS = 200


@dataclass(frozen=True)
class Histogram:
    """How a score spreads over right and over wrong answers.

    Attributes:
        edges: of the bins, one more than bins.
        right: share of the right answers in each bin.
        wrong: share of the wrong ones.
    """

    edges: tuple[float, ...]
    right: tuple[float, ...]
    wrong: tuple[float, ...]


@dataclass(frozen=True)
class RiskCoverage:
    """Share of wrong answers among the least suspicious samples.

    Attributes:
        coverage: share of the samples that are answered, rising.
        risk: share of wrong answers among them.
    """

    coverage: tuple[float, ...]
    risk: tuple[float, ...]


@dataclass(frozen=True)
class Suspicion:
    """Confusion and confidence as alarms for wrong answers of the last exit.

    Attributes:
        found: the figures.
        histogram: of normalised confusion.
        roc: name of the score to its curve.
        risks: name of the score to its curve.
    """

    found: Confusion
    histogram: Histogram
    roc: dict[str, Roc]
    risks: dict[str, RiskCoverage]


def measure_suspicion(trace: Trace, training: Trace) -> Suspicion:
    """Compare confusion and confidence as alarms.

    Args:
        trace: with labels.
        training: of the training split; confusion's mean and spread come from it.

    Raises:
        TraceError: as for ``measure_confusion``.
    """
    found = measure_confusion(trace, training)
    mean, spread = usual_confusion(training)
    wrong = ~trace.correct[:, -1]
    confusion = confusion_scores(trace).double()
    scores = {"confusion": confusion, "max-softmax": -trace.confidences[:, -1].double()}
    return Suspicion(
        found,
        _histogram((confusion - mean) / spread, wrong),
        {name: roc(values, wrong) for name, values in scores.items()},
        {name: _thinned(risk_coverage(values, wrong)) for name, values in scores.items()},
    )


def _histogram(scores: Float64[Tensor, " n"], wrong: Tensor) -> Histogram:
    low, high = scores.min().item(), scores.max().item()
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)

    def shares(part: Tensor) -> tuple[float, ...]:
        return tuple((torch.histc(part, BINS, low, high) / len(part)).tolist())

    return Histogram(tuple(edges.tolist()), shares(scores[~wrong]), shares(scores[wrong]))


def _thinned(risks: Float64[Tensor, " n"]) -> RiskCoverage:
    kept = torch.linspace(0, len(risks) - 1, min(POINTS, len(risks)), dtype=torch.float64).round().long()
    return RiskCoverage(tuple(((kept + 1) / len(risks)).tolist()), tuple(risks[kept].tolist()))
