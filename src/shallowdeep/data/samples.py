"""What training and recording ask of data: samples that come in batches, in up to three splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.labels import LabelTree
from shallowdeep.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random changes of training images: a window cut out at random, then a left-right flip of half of them.

    Args:
        pad: black pixels put around the image before a window of its own size is cut out at random.
        flip: whether to mirror each image with probability one half.
        min_area: below 1, a window of at least this share of the original's area, of proportions 3:4 to 4:3, is
            cut out at random and enlarged; for images that are decoded as they are needed.

    Raises:
        ConfigError: ``pad`` is negative, or ``min_area`` is no share.
    """

    pad: int = 0
    flip: bool = False
    min_area: float = 1.0

    def __post_init__(self):
        if not 0 < self.min_area <= 1:
            raise ConfigError(f"cannot cut out at least {self.min_area} of an image. Give a share above 0, up to 1.0.")
        if self.pad < 0:
            raise ConfigError(f"cannot pad by {self.pad} pixels. Give 0 (no crop) or more.")


class Batch(NamedTuple):
    """Some samples, ready for a network.

    Attributes:
        inputs: what the network takes: a tensor, or a tuple or mapping of tensors, samples as rows.
        labels: int64, shape ``(b,)``, or ``None``.
        ids: int64, shape ``(b,)``.
    """

    inputs: Any
    labels: Int[Tensor, " b"] | None
    ids: Int[Tensor, " b"]


@runtime_checkable
class Samples(Protocol):
    """Samples of one split, in batches: what ``fit`` and ``record`` read.

    Attributes:
        name: of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``, or empty where it is not known.
        class_names: one per label; empty where the labels have no names, or there are none.
        tree: the labels' two levels, where the data set has two.
        num_classes: how many labels there are; 0 where it is not known.
        example_inputs: the inputs of a few samples, as in a batch.
    """

    if TYPE_CHECKING:  # Python 3.11's isinstance would ask for each of them, and so open a stream for its example

        @property
        def name(self) -> str: ...
        @property
        def split(self) -> str: ...
        @property
        def class_names(self) -> tuple[str, ...]: ...
        @property
        def tree(self) -> LabelTree | None: ...
        @property
        def num_classes(self) -> int: ...
        @property
        def example_inputs(self) -> Any: ...

    def __len__(self) -> int: ...

    def to(self, device: str | torch.device) -> Samples:
        """The same samples, whose batches come on another device."""
        ...

    def num_batches(self, batch_size: int, drop_last: bool = False) -> int:
        """How many batches ``batches`` gives."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        augment: Augmentation | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """All samples once.

        Args:
            batch_size: samples per batch, of all shards together; the last batch may be smaller.
            augment: random changes of training images; needs a seed.
            seed: of this pass, for its order and random changes; ``None`` keeps the set's order.
            drop_last: leave out a smaller last batch.
            channels_last: give image inputs in that memory format.
            shard: ``(rank, number of processes)``: give only this process's share of each batch, every
                ``number``-th row from ``rank`` on. Together the shards hold each sample once.
        """
        ...


@runtime_checkable
class IndexedSamples(Samples, Protocol):
    """Samples that are at hand by their number, so that some of them can be taken.

    Attributes:
        ids: tell the samples of one source apart; subsets keep them.
    """

    if TYPE_CHECKING:

        @property
        def ids(self) -> Int[Tensor, " n"]: ...

    def subset(self, indices: Sequence[int] | Int[Tensor, " k"], split: str | None = None) -> IndexedSamples:
        """Some of the samples, in the order given; their ids travel along."""
        ...

    def sample(self, n: int, seed: int = 0) -> IndexedSamples:
        """At most ``n`` samples with the classes in proportion, in their order."""
        ...

    def md5(self) -> dict[str, str]:
        """Fingerprints of inputs and labels."""
        ...


def own_rows(count: int, shard: tuple[int, int]) -> slice:
    """The rows of a batch of ``count`` samples that belong to one process.

    >>> list(range(7))[own_rows(7, (1, 3))]
    [1, 4]
    """
    rank, number = shard
    if not 0 <= rank < number:
        raise ConfigError(f"shard {shard} is none: the rank must be from 0 to {number - 1}.")
    return slice(rank, count, number)


@dataclass(frozen=True, eq=False)
class Splits:
    """One data set in up to three parts, with the augmentation that suits its training part.

    Args:
        train: what networks learn from.
        val: what thresholds are chosen on; ``None``: training is not looked at from outside.
        test: what is reported, and nothing else.
        augment: for ``train.batches``.
    """

    train: Samples
    val: Samples | None = None
    test: Samples | None = None
    augment: Augmentation | None = None

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.train.name

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return self.train.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One per label."""
        return self.train.class_names

    @property
    def example_inputs(self) -> Any:
        """The inputs of a few training samples."""
        return self.train.example_inputs

    def split(self, name: str) -> Samples:
        """A split by name.

        Raises:
            DataError: the data set has none of that name.
        """
        found = getattr(self, name) if name in SPLITS else None
        if found is None:
            there = [split for split in SPLITS if getattr(self, split) is not None]
            raise DataError(f"{self.name} has no {name} split, only {', '.join(there)}.")
        return found

    def to(self, device: str | torch.device) -> Splits:
        """The same splits on another device."""
        return replace(
            self,
            train=self.train.to(device),
            val=None if self.val is None else self.val.to(device),
            test=None if self.test is None else self.test.to(device),
        )
