"""Figures that others published, to stand beside ours; shares in [0, 1].

Kaya, Hong & Dumitras, "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking", ICML 2019, as far as
they could be had: from its abstract, its project page, its talk and notes by its readers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MaxRow:
    """A row of the paper's table 3, column "Max": the highest accuracy that any threshold reaches on test.

    Attributes:
        plain: accuracy of the network as it was, the paper's "CNN".
        ic_only: Max after IC-only training.
        joint: Max after SDN training.
    """

    plain: float
    ic_only: float
    joint: float


TABLE_3 = {
    ("cifar100", "vgg16"): MaxRow(0.709, 0.726, 0.744),
    ("cifar100", "resnet56"): MaxRow(0.688, 0.697, 0.709),
    ("cifar100", "wrn32_4"): MaxRow(0.751, 0.755, 0.773),
    ("cifar100", "mobilenet"): MaxRow(0.649, 0.676, 0.689),
    ("tinyimagenet", "vgg16"): MaxRow(0.586, 0.604, 0.634),
}
COMPUTE = {"ic_only": 1 + 25 / (3 * 100), "joint": 1.0, "mixed": 1.0}
"""Training compute as a multiple of the plain network's: 100 epochs of it, with exits or without, and for exits alone
25 epochs of forward passes besides. Mixed training, which the paper does not have, is held against joint training."""

WASTEFUL = {"cifar10": 0.95, "cifar100": 0.81, "tinyimagenet": 0.69}
"""Largest share of samples that an internal exit gets right."""

DESTRUCTIVE = 0.5
"""Share of a network's errors that an earlier exit had right: "about half"."""

GAIN = (0.08, 0.10)
"""Largest gain of early exits over the network: in the paper's introduction, in its talk; perhaps relative."""

BACKDOOR = (0.12, 0.84)
"""Accuracy on triggered samples: of the backdoored network, and with early exits."""


def published_gain(data: str, network: str, strategy: str) -> float | None:
    """Accuracy at Max over the plain network's; mixed training is held against joint training.

    >>> round(published_gain("cifar100", "vgg16", "mixed"), 4), published_gain("cifar10", "vgg16", "joint")
    (0.035, None)
    """
    row = TABLE_3.get((data, network))
    return None if row is None else (row.ic_only if strategy == "ic_only" else row.joint) - row.plain


@dataclass(frozen=True)
class ConfusionRow:
    """Means over right and over wrong answers, of VGG-16 on Tiny ImageNet."""

    confusion_correct: float = -0.29
    confusion_wrong: float = 0.71
    confidence_correct: float = 0.93
    confidence_wrong: float = 0.71


CONFUSION = {("tinyimagenet", "vgg16"): ConfusionRow()}
