"""Confusion: how much the exits disagree with the last one, and whether that tells wrong answers from right."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shallowdeep.analysis.detection import auroc, risk_at, risk_coverage
from shallowdeep.analysis.shares import share
from shallowdeep.errors import TraceError
from shallowdeep.traces.trace import Trace


@dataclass(frozen=True)
class Confusion:
    """Confusion on one split, and three scores compared as detectors of wrong answers of the last exit.

    Confusion is normalised: zero mean and unit spread on the training split.

    Attributes:
        n: samples.
        mean_correct: mean normalised confusion where the last exit is right.
        mean_wrong: the same where it is wrong.
        wrong_below_correct_mean: share of wrong answers less confused than the mean right one, which an
            alarm at that mean would miss.
        correct_above_wrong_mean: share of right answers more confused than the mean wrong one.
        confidence_correct: mean largest softmax probability of the last exit where it is right.
        confidence_wrong: the same where it is wrong.
        wrong_above_correct_mean_confidence: share of wrong answers more confident than the mean right one,
            the alarm that confidence would miss.
        auroc: name of the score to its area under the ROC curve for finding wrong answers (0.5: chance).
        aurc: name of the score to its area under the risk-coverage curve: the share of wrong answers among the least
            suspicious samples, in the mean over all numbers of them (lower is better). Equal scores are taken in
            the mean over all their orders.
        risk_at_80: name of the score to the share of wrong answers among the 80 % least suspicious samples.
        risk_at_90: the same among 90 %.
    """

    n: int
    mean_correct: float
    mean_wrong: float
    wrong_below_correct_mean: float
    correct_above_wrong_mean: float
    confidence_correct: float
    confidence_wrong: float
    wrong_above_correct_mean_confidence: float
    auroc: dict[str, float]
    aurc: dict[str, float]
    risk_at_80: dict[str, float]
    risk_at_90: dict[str, float]

    def rows(self) -> list[dict[str, Any]]:
        """One row per score."""
        return [
            {
                "score": name,
                "AUROC": self.auroc[name],
                "AURC": self.aurc[name],
                "risk at 80 %": self.risk_at_80[name],
                "risk at 90 %": self.risk_at_90[name],
            }
            for name in self.auroc
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        areas = ", ".join(f"{name} {value:.3f}" for name, value in self.auroc.items())
        risks = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.risk_at_80.items())
        return (
            f"Normalised confusion is {self.mean_correct:+.2f} on right and {self.mean_wrong:+.2f} on wrong answers; "
            f"confidence {self.confidence_correct:.2f} and {self.confidence_wrong:.2f}.\n"
            f"An alarm at the mean of the right answers misses {100 * self.wrong_below_correct_mean:.1f} % of the "
            f"wrong ones by confusion, {100 * self.wrong_above_correct_mean_confidence:.1f} % by confidence.\n"
            f"AUROC for finding wrong answers: {areas}. Wrong among the 80 % least suspicious: {risks}."
        )


def confusion_scores(trace: Trace) -> Float[Tensor, " n"]:
    """How much each sample's exits disagree with the last one.

    The sum over exits of the L1 distance between the last softmax and that exit's softmax.

    Returns:
        Shape ``(n,)``, in [0, 2 · (exits - 1)]; the last exit itself adds 0.

    Raises:
        TraceError: exits differ in width.

    Deviation: the authors' code measures distances with an offset of 1e-6 per class; here they are exact.
    Cite: Kaya, Hong & Dumitras, ICML 2019, section 5.2.
    """
    if len({logits.shape[1] for logits in trace.logits}) != 1:
        raise TraceError("confusion compares softmax vectors; these exits differ in their number of outputs.")
    last = trace.logits[-1].softmax(-1)
    return sum(((logits.softmax(-1) - last).abs().sum(1) for logits in trace.logits[:-1]), torch.zeros(len(trace)))


def usual_confusion(training: Trace) -> tuple[float, float]:
    """Mean and (population) spread of confusion on the training split, which normalise it.

    Args:
        training: of the training split, un-augmented.

    Raises:
        TraceError: there are no internal exits, or confusion is the same on every sample.
    """
    if training.num_exits < 2:
        raise TraceError("confusion needs internal exits, and this Trace has only the last one.")
    # In double, the mean of equal scores is that score, and no score lies above or below it.
    usual = confusion_scores(training).double()
    if usual.min() == usual.max():
        raise TraceError(f"confusion is {usual[0]} on every training sample; there is no spread to normalise by.")
    return usual.mean().item(), usual.std(correction=0).item()


def measure_confusion(trace: Trace, training: Trace) -> Confusion:
    """Whether confusion tells the last exit's wrong answers from its right ones.

    Args:
        trace: with labels.
        training: of the training split, un-augmented; mean and (population) spread come from it.

    Raises:
        TraceError: there are no labels, no internal exits, no wrong or no right answers, no spread on the
            training split, or the two Traces are of different networks.

    Cite: Kaya, Hong & Dumitras, ICML 2019, section 5.2; risk-coverage: Geifman & El-Yaniv, NeurIPS 2017.
    """
    if training.costs != trace.costs:
        raise TraceError("the training Trace is of another network than this one.")
    mean, spread = usual_confusion(training)
    right = trace.correct[:, -1]
    if right.all() or not right.any():
        raise TraceError("the last exit's answers are all right or all wrong; there is nothing to tell apart.")
    confusion, confidence = confusion_scores(trace).double(), trace.confidences[:, -1].double()
    of_right, of_wrong, sure = confusion[right].mean(), confusion[~right].mean(), confidence[right].mean()
    entropy = torch.special.entr(trace.logits[-1].softmax(-1)).sum(1)
    suspicion = {"confusion": confusion, "max-softmax": -confidence, "entropy": entropy}
    risks = {name: risk_coverage(scores, ~right) for name, scores in suspicion.items()}
    return Confusion(
        n=len(trace),
        mean_correct=(of_right.item() - mean) / spread,
        mean_wrong=(of_wrong.item() - mean) / spread,
        wrong_below_correct_mean=share(confusion[~right] < of_right),
        correct_above_wrong_mean=share(confusion[right] > of_wrong),
        confidence_correct=sure.item(),
        confidence_wrong=confidence[~right].mean().item(),
        wrong_above_correct_mean_confidence=share(confidence[~right] > sure),
        auroc={name: auroc(scores, ~right) for name, scores in suspicion.items()},
        aurc={name: risk.mean().item() for name, risk in risks.items()},
        risk_at_80={name: risk_at(risk, 0.8) for name, risk in risks.items()},
        risk_at_90={name: risk_at(risk, 0.9) for name, risk in risks.items()},
    )
