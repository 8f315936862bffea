"""Splitting samples so that every class keeps its share."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.errors import DataError


def stratified_split(
    labels: Int[Tensor, " n"], num_held_out: int, seed: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Split positions at random, with the classes in the same proportions on both sides.

    Exact sizes; what proportions leave over goes to the classes with the largest remainders, the lower
    label first.

    Args:
        labels: of all samples.
        num_held_out: size of the second part.
        seed: the same seed gives the same split.

    Returns:
        The kept and the held-out positions, each rising, on the CPU.

    Raises:
        DataError: ``num_held_out`` is negative or more than there are.

    >>> kept, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), 3, seed=0)
    >>> len(kept), torch.tensor([0, 0, 0, 0, 1, 1])[held]
    (3, tensor([0, 0, 1]))
    """
    if not 0 <= num_held_out <= len(labels):
        raise DataError(f"cannot hold out {num_held_out} of {len(labels)} samples. Hold out fewer.")
    _, classes, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    shares = counts * num_held_out  # in n-ths of a sample: whole numbers, so ties are ties
    quotas = shares // len(labels)
    remainders = (shares % len(labels)).argsort(descending=True, stable=True)
    quotas[remainders[: num_held_out - int(quotas.sum())]] += 1

    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[classes[shuffled].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[classes[by_class]]
    held = rank < quotas[classes[by_class]]
    return by_class[~held].sort().values, by_class[held].sort().values
