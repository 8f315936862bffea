"""Losses: per-exit logits, labels and progress in [0, 1) become one number.

An ``Objective`` is any callable of that shape; these are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[list[Tensor], Tensor, float], Tensor]
"""``(per-exit logits, labels, progress) -> loss``; the last logits are the backbone's own."""


@dataclass(frozen=True)
class Plain:
    """Cross-entropy of the last exit: ordinary training of the backbone."""

    label_smoothing: float = 0.0

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        """The loss, a scalar."""
        return F.cross_entropy(logits[-1], labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Exits:
    """Unweighted sum of the internal exits' cross-entropies, the last exit left out: IC-only training."""

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
