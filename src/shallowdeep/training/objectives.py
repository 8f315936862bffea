"""Losses: per-exit logits, labels and progress in [0, 1) become one number.

An ``Objective`` is any callable of that shape. Those with ``needs_labels`` cannot do without labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from shallowdeep.errors import ConfigError

Objective = Callable[[list[Tensor], Any, float], Tensor]
"""``(per-exit logits, labels or None, progress) -> loss``; the last logits are the backbone's own."""


@dataclass(frozen=True)
class Plain:
    """Cross-entropy of the last exit: ordinary training of the backbone."""

    needs_labels: ClassVar[bool] = True
    label_smoothing: float = 0.0

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        """The loss, a scalar."""
        return F.cross_entropy(logits[-1], labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Exits:
    """Unweighted sum of the internal exits' cross-entropies, the last exit left out: IC-only training."""

    needs_labels: ClassVar[bool] = True
    label_smoothing: float = 0.0

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        """The loss, a scalar."""
        losses = [F.cross_entropy(x, labels, label_smoothing=self.label_smoothing) for x in logits[:-1]]
        return sum(losses[1:], losses[0])


@dataclass(frozen=True)
class Joint:
    """Cross-entropy of the last exit plus the weighted ones of the internal exits.

    The weight of exit i rises over training: ``tau_i = min(C_i, 0.01 + C_i * progress)``.

    Args:
        weights: ``C_i`` of each internal exit; the paper takes the cost share it was asked to sit at.

    Deviation: the authors' code steps once per epoch, with ``progress = epoch / 100`` and epochs from 1;
    here it rises with every batch, which stays within ``C_i / 100`` of theirs.
    Cite: Kaya, Hong & Dumitras, ICML 2019, section 4.
    """

    needs_labels: ClassVar[bool] = True
    weights: tuple[float, ...]
    label_smoothing: float = 0.0

    def taus(self, progress: float) -> list[float]:
        """Weights of the internal exits at a progress.

        >>> Joint((0.15, 0.9)).taus(0.0), Joint((0.15, 0.9)).taus(0.99)
        ([0.01, 0.01], [0.15, 0.9])
        """
        return [min(weight, 0.01 + weight * progress) for weight in self.weights]

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        """The loss, a scalar."""
        loss = F.cross_entropy(logits[-1], labels, label_smoothing=self.label_smoothing)
        for tau, x in zip(self.taus(progress), logits[:-1], strict=True):
            loss = loss + tau * F.cross_entropy(x, labels, label_smoothing=self.label_smoothing)
        return loss


@dataclass(frozen=True)
class Distil:
    """Unweighted sum over the internal exits of ``KL(last || exit)``: they learn the last exit's own answers.

    No labels are needed; no gradient flows into the last exit.

    Args:
        temperature: softens both distributions; the loss is multiplied by its square, so that gradients keep
            their size.

    Cite: Hinton, Vinyals & Dean, 2015; between exits: Phuong & Lampert, ICCV 2019, who add it to the exits'
    cross-entropies, for which there are no labels here.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"a temperature is above 0, got {self.temperature}.")

    def __call__(self, logits: list[Tensor], labels: Tensor | None, progress: float) -> Tensor:
        """The loss, a scalar; the mean over samples."""
        taught = F.log_softmax(logits[-1].detach() / self.temperature, dim=-1)
        losses = [
            F.kl_div(F.log_softmax(x / self.temperature, dim=-1), taught, reduction="batchmean", log_target=True)
            for x in logits[:-1]
        ]
        return sum(losses[1:], losses[0]) * self.temperature**2
