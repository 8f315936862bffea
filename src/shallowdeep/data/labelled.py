"""What all sets of labelled samples share: checks, positions, each process's part of a batch, fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.labels import LabelTree
from shallowdeep.data.samples import SPLITS, Augmentation, own_rows
from shallowdeep.errors import ConfigError, DataError


def check_labelled(
    labels: Tensor | None,
    ids: Tensor,
    *,
    class_names: tuple[str, ...],
    num_classes: int,
    split: str,
    tree: LabelTree | None,
) -> None:
    """Check the labels (if any), ids, split and tree of a set that has one label for each id, and one at least.

    Raises:
        DataError: they are no whole numbers, a label has no name, an id is there twice, or the rest does not fit.
    """
    if split not in SPLITS:
        raise DataError(f"no split '{split}'. Use one of: {', '.join(SPLITS)}.")
    for what, numbers in (("labels", labels), ("ids", ids)):
        if numbers is None:
            continue
        if numbers.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64) or numbers.ndim != 1:
            raise DataError(f"{what} are {numbers.dtype} of shape {tuple(numbers.shape)}. Give int64, one per sample.")
    low, high = (0, -1) if labels is None else (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"label {low if low < 0 else high} has no class name: there are {num_classes}. "
            "Count labels from 0, and name every class."
        )
    if tree and class_names not in (tree.fine_names, tree.coarse_names):
        raise DataError(
            f"the {num_classes} class names are neither the label tree's {tree.num_fine} fine nor "
            f"its {tree.num_coarse} coarse names. Take them from the tree, or give no tree."
        )
    values, counts = ids.unique(return_counts=True)
    if len(values) != len(ids):
        raise DataError(f"id {int(values[counts.argmax()])} is there twice. Give every sample its own id.")


def positions(indices: Sequence[int] | Int[Tensor, " k"], count: int) -> Int[Tensor, " k"]:
    """Positions in a set of ``count`` samples, on the CPU.

    Raises:
        DataError: one is outside the set.
    """
    chosen = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if len(outside):
        raise DataError(f"no sample {int(outside[0])}: the set has {count}, counted from 0.")
    return chosen


def check_pass(batch_size: int, augment: Augmentation | None, seed: int | None) -> None:
    """Check what ``batches`` of any set is asked for.

    Raises:
        ConfigError: the batch size is below 1, or there is an augmentation without a seed.
    """
    if batch_size < 1:
        raise ConfigError(f"a batch of {batch_size} samples is none. Give 1 or more.")
    if augment is not None and seed is None:
        raise ConfigError(f"{augment} without a seed would differ in every run. Give a seed.")


def own_parts(count: int, batch_size: int, drop_last: bool, shard: tuple[int, int]) -> Iterator[slice]:
    """The rows of each batch of a pass over ``count`` samples that belong to one process; empty shares left out.

    >>> [list(range(7))[part] for part in own_parts(7, 3, False, (1, 2))]
    [[1], [4]]
    """
    own = own_rows(batch_size, shard)
    end = count // batch_size * batch_size if drop_last else count
    starts = (start + own.start for start in range(0, end, batch_size))
    stops = range(batch_size, end + batch_size, batch_size)
    return (slice(start, stop, own.step) for start, stop in zip(starts, stops, strict=True) if start < end)


def labels_md5(labels: Int[Tensor, " n"], num_classes: int) -> str:
    """Fingerprint of the labels as uint8, as int64 with more than 256 classes."""
    width = torch.uint8 if num_classes <= 256 else torch.int64
    return hashlib.md5(labels.cpu().to(width).numpy().data, usedforsecurity=False).hexdigest()
