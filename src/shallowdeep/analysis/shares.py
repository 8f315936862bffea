"""Shares of samples: what analyses count."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def share(mask: Bool[Tensor, " n"]) -> float:
    """Of the samples, in [0, 1]; not a number where there are none.

    >>> import torch
    >>> share(torch.tensor([True, False, True, True]))
    0.75
    """
    return mask.double().mean().item()


def shares(mask: Bool[Tensor, "n exits"]) -> tuple[float, ...]:
    """``share`` of each column."""
    return tuple(mask.double().mean(0).tolist())
