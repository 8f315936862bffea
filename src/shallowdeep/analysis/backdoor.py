"""Backdoors along the depth: at which exits the attack wins, and whether confusion gives triggered samples away."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shallowdeep.analysis.confusion import confusion_scores, usual_confusion
from shallowdeep.analysis.detection import Roc, auroc, roc
from shallowdeep.analysis.shares import shares
from shallowdeep.errors import ConfigError, TraceError
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import ExitPolicy
from shallowdeep.traces.trace import Trace


@dataclass(frozen=True)
class BackdoorWithPolicy:
    """What an attack comes to where samples leave early; all shares in [0, 1].

    Attributes:
        policy: as ``policy_from_dict`` reads it.
        clean_accuracy: on clean samples.
        accuracy: on triggered samples, against their true labels.
        attack_success: share of triggered samples that are answered with the target.
        clean_cost: mean over clean samples, as a share of the plain network.
        triggered_cost: the same over triggered samples.
    """

    policy: dict[str, Any]
    clean_accuracy: float
    accuracy: float
    attack_success: float
    clean_cost: float
    triggered_cost: float


@dataclass(frozen=True)
class BackdoorEffect:
    """What a backdoor does to each exit, and how well two scores find the triggered samples; shares in [0, 1].

    Confusion is normalised: zero mean and unit spread on the training split.

    Attributes:
        n_clean: clean samples.
        n_triggered: samples with the trigger, none of them truly of the target class.
        target: the class that the attack wants.
        clean_accuracy: of each exit on clean samples.
        clean_target: share of the clean samples *of other classes* that each exit answers with the target: what
            attack success would be without a trigger.
        accuracy: of each exit on triggered samples, against their true labels.
        attack_success: share of triggered samples that each exit answers with the target.
        with_policy: the same with early exits; ``None`` where no policy was given.
        confusion_clean: mean normalised confusion of clean samples.
        confusion_triggered: the same of triggered ones.
        confidence_clean: mean largest softmax probability of the last exit on clean samples.
        confidence_triggered: the same on triggered ones.
        auroc: name of the score to its area under the ROC curve for telling triggered samples from clean ones
            (0.5: chance). Below 0.5, triggered samples look *less* suspicious than clean ones.
        roc: name of the score to that curve.
    """

    n_clean: int
    n_triggered: int
    target: int
    clean_accuracy: tuple[float, ...]
    clean_target: tuple[float, ...]
    accuracy: tuple[float, ...]
    attack_success: tuple[float, ...]
    with_policy: BackdoorWithPolicy | None
    confusion_clean: float
    confusion_triggered: float
    confidence_clean: float
    confidence_triggered: float
    auroc: dict[str, float]
    roc: dict[str, Roc]

    def rows(self) -> list[dict[str, Any]]:
        """One row per exit, and one for the policy, if there is one."""
        columns = zip(self.clean_accuracy, self.clean_target, self.accuracy, self.attack_success, strict=True)
        rows = [_row(exit, *values) for exit, values in enumerate(columns)]
        found = self.with_policy
        if found is not None:
            rows.append(_row("with policy", found.clean_accuracy, None, found.accuracy, found.attack_success))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"The last exit is right on {100 * self.clean_accuracy[-1]:.2f} % of {self.n_clean} clean samples and on "
            f"{100 * self.accuracy[-1]:.2f} % of {self.n_triggered} triggered ones, of which it answers "
            f"{100 * self.attack_success[-1]:.2f} % with class {self.target} "
            f"({100 * self.clean_target[-1]:.2f} % without the trigger)."
        ]
        found = self.with_policy
        if found is not None:
            lines.append(
                f"With early exits, {100 * found.clean_accuracy:.2f} % and {100 * found.accuracy:.2f} %, and "
                f"{100 * found.attack_success:.2f} % with class {self.target}; cost {100 * found.clean_cost:.1f} % "
                f"and {100 * found.triggered_cost:.1f} %."
            )
        areas = ", ".join(f"{name} {value:.3f}" for name, value in self.auroc.items())
        lines.append(
            f"Normalised confusion is {self.confusion_clean:+.2f} on clean and {self.confusion_triggered:+.2f} on "
            f"triggered samples; AUROC for finding triggered ones: {areas}."
        )
        return "\n".join(lines)


def measure_backdoor(
    clean: Trace, triggered: Trace, target: int, *, training: Trace, policy: ExitPolicy | None = None
) -> BackdoorEffect:
    """What a backdoored network's exits answer to clean and to triggered samples.

    Args:
        clean: of clean samples of all classes, with true labels.
        triggered: of samples with the trigger, with *true* labels, the target class left out, as
            ``data.triggers.triggered`` gives them.
        target: class that the attack wants.
        training: of the clean training split, un-augmented; confusion's mean and spread come from it.
        policy: with early exits too; its threshold comes from clean validation data.

    Raises:
        TraceError: a triggered sample is truly of the target class, clean samples are all of it, there are no
            labels, no internal exits or no spread on the training split, or the Traces are of different networks.
        ConfigError: the target is no class, or the policy looks at an exit that is not there.

    Cite: Kaya, Hong & Dumitras, ICML 2019, where early exits raise the accuracy on triggered samples from 12 to 84 %;
    poisoning rate, training and threshold of that attack are not published.
    """
    _check_traces(clean, triggered, target, training)
    mean, spread = usual_confusion(training)
    confusion = [confusion_scores(trace).double() for trace in (clean, triggered)]
    confidence = [trace.confidences[:, -1].double() for trace in (clean, triggered)]
    stamped = torch.cat([torch.zeros(len(clean)), torch.ones(len(triggered))]).bool()
    suspicion = {"confusion": torch.cat(confusion), "max-softmax": -torch.cat(confidence)}
    return BackdoorEffect(
        n_clean=len(clean),
        n_triggered=len(triggered),
        target=target,
        clean_accuracy=shares(clean.correct),
        clean_target=shares(clean.predictions[clean.true_labels != target] == target),
        accuracy=shares(triggered.correct),
        attack_success=shares(triggered.predictions == target),
        with_policy=None if policy is None else _with_policy(clean, triggered, target, policy),
        confusion_clean=(_mean(confusion[0]) - mean) / spread,
        confusion_triggered=(_mean(confusion[1]) - mean) / spread,
        confidence_clean=_mean(confidence[0]),
        confidence_triggered=_mean(confidence[1]),
        auroc={name: auroc(scores, stamped) for name, scores in suspicion.items()},
        roc={name: roc(scores, stamped) for name, scores in suspicion.items()},
    )


def _check_traces(clean: Trace, triggered: Trace, target: int, training: Trace) -> None:
    for name, other in (("triggered", triggered), ("training", training)):
        if other.costs != clean.costs:
            raise TraceError(f"the {name} Trace is of another network than the clean one. Record all with one network.")
    if not 0 <= target < clean.num_outputs:
        raise ConfigError(f"target = {target} is no class: the last exit has outputs 0 to {clean.num_outputs - 1}.")
    of_target = int((triggered.true_labels == target).sum())
    if of_target:
        raise TraceError(
            f"{of_target} of {len(triggered)} triggered samples are truly of the target class {target}, where to "
            "answer it is right. Leave them out, as data.triggers.triggered does, and keep the true labels."
        )
    if bool((clean.true_labels == target).all()):
        raise TraceError(f"all clean samples are of the target class {target}. Record clean samples of all classes.")


def _with_policy(clean: Trace, triggered: Trace, target: int, policy: ExitPolicy) -> BackdoorWithPolicy:
    on_clean, on_triggered = replay(clean, policy), replay(triggered, policy)
    return BackdoorWithPolicy(
        policy=policy.to_dict(),
        clean_accuracy=on_clean.accuracy,
        accuracy=on_triggered.accuracy,
        attack_success=_mean((on_triggered.predictions == target).double()),
        clean_cost=on_clean.cost,
        triggered_cost=on_triggered.cost,
    )


def _row(
    exit: int | str, clean: float, clean_target: float | None, accuracy: float, attack_success: float
) -> dict[str, Any]:
    return {
        "exit": exit,
        "clean accuracy": clean,
        "target on clean": clean_target,
        "accuracy on triggered": accuracy,
        "attack success": attack_success,
    }


def _mean(values: Float[Tensor, " n"]) -> float:
    return values.mean().item()
