"""Anyone's batches as samples: a DataLoader, a list, or a function that makes an iterator."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from shallowdeep.data.foreign import read_batch
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.pytrees import map_tensors, take_rows, to_channels_last
from shallowdeep.data.samples import SPLITS, Augmentation, Batch, Samples, Splits, own_rows
from shallowdeep.errors import ConfigError, DataError

_AGAIN = "Give something that can be iterated again: a DataLoader, a list, or a function that makes the iterator."


class Stream:
    """Batches that someone else makes, passed on one by one and never held together.

    A batch is ``(inputs, labels)``, ``(inputs, labels, ids)``, the inputs alone, or a mapping such as a Hugging
    Face collator gives: its entry ``labels`` (or ``label``) are the labels, the others the network's keyword
    inputs. Inputs are a tensor, or a tuple or mapping of tensors, samples as rows. NumPy arrays become tensors.

    The source decides what is in a batch: its size, order and augmentation. Where several processes train or
    record, each runs through the whole source and keeps its own rows of each batch, so the source must give
    all of them the same batches; a ``DistributedSampler`` is not wanted.

    Args:
        source: a DataLoader, a list or any other iterable of batches, or a function without arguments that
            makes a fresh iterator for each pass.
        split: ``"train"``, ``"val"`` or ``"test"``, or empty.
        num_classes: how many labels there are; of ``class_names`` when not given, 0: not known.
        class_names: one per label, or none.
        name: of the data set.
        num_batches: of one pass; needed by training where the source has no length. A longer (or endless)
            source is left there, a shorter one is an error.
        tree: the labels' two levels, where there are two.

    Raises:
        DataError: the source is one tensor, a data set of single samples, or nothing to iterate over.
        ConfigError: the number of batches is below 1, the split has no such name, or there are more class
            names than classes or fewer.

    >>> stream = Stream([(torch.zeros(3, 2), torch.tensor([0, 1, 1]))], num_classes=2)
    >>> [batch.ids.tolist() for batch in stream.batches(0, shard=(1, 2))]
    [[1]]
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        split: str = "",
        num_classes: int = 0,
        class_names: tuple[str, ...] = (),
        name: str = "stream",
        num_batches: int | None = None,
        tree: LabelTree | None = None,
    ):
        _check_source(source)
        self.source = source
        self.split = split
        self.num_classes = num_classes or len(class_names)
        self.class_names = tuple(class_names)
        self.name = name
        self.tree = tree
        self.device: torch.device | None = None
        self._num_batches = num_batches
        self._check()

    def __len__(self) -> int:
        """How many samples a pass has.

        Raises:
            ConfigError: nobody knows before a pass is over.
        """
        count = _num_samples(self.source, self._num_batches)
        if count is None:
            raise ConfigError(
                f"how many samples {self.name} has is not known before they are counted. Count those of its batches, "
                "or give a list, or a DataLoader with a batch size over a data set that has a length."
            )
        return count

    @property
    def example_inputs(self) -> Any:
        """The inputs of up to four samples of a first batch, on the stream's device.

        Raises:
            DataError: the source is an iterator, which a look would rob of its first batch.
        """
        if isinstance(self.source, Iterator):
            raise DataError(f"{self.name} is an iterator: to look at its first batch would lose it. {_AGAIN}")
        return self._moved(take_rows(next(self._pass(seed=0)).inputs, slice(4)))

    def to(self, device: str | torch.device) -> Stream:
        """The same source, whose batches are moved to another device as they come."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def with_classes(self, num_classes: int) -> Stream:
        """The same source, whose labels must be below a number."""
        told = copy.copy(self)
        told.num_classes = num_classes
        return told

    def num_batches(self, batch_size: int = 0, drop_last: bool = False) -> int:
        """How many batches a pass has, whatever size and treatment of the last one is asked for.

        Raises:
            ConfigError: it was not given, and the source has no length.
        """
        if self._num_batches is not None:
            return self._num_batches
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:  # a DataLoader over an endless data set has a length that cannot be asked for
            raise ConfigError(
                f"{self.name} has no length, and training plans by it. Say how many batches a pass has: "
                "Stream(…, num_batches=…)."
            ) from None

    def batches(
        self,
        batch_size: int = 0,
        *,
        augment: Augmentation | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """All batches of one pass.

        With a seed, a ``DataLoader(shuffle=True)`` gives the same order for the same seed, and so do transforms
        in its workers, for one number of workers and without ``persistent_workers`` (which keep their random
        state from pass to pass). A loader with a ``generator`` of its own keeps to that one. Transforms
        without workers draw from PyTorch's global random state, which ``fit`` seeds in every epoch; those that
        use ``random`` or NumPy there are the caller's to seed.

        Args:
            batch_size: not looked at: the source decides.
            augment: not looked at, with a warning: the source decides.
            seed: of this pass, for a source that draws from PyTorch's random numbers.
            drop_last: leave out a batch with fewer rows than there are processes, so that all take equally
                many steps; any other small batch is passed on (say ``drop_last=True`` to the DataLoader).
            channels_last: give floating-point inputs of four dimensions in that memory format.
            shard: ``(rank, number of processes)``: every ``number``-th row of each batch from ``rank`` on; a
                share without rows is left out.

        Raises:
            DataError: a pass has no batch or fewer than promised, or a batch is not what the class says.
            ConfigError: the shard is none, or the DataLoader deals its samples out among processes by itself.
        """
        if augment not in (None, Augmentation()):
            warnings.warn(f"{augment} is left out: the source of {self.name} changes its samples.", stacklevel=2)
        own_rows(0, shard)
        _check_sampler(self.source, shard)
        return self._shares(seed, drop_last, channels_last, shard)

    def _shares(
        self, seed: int | None, drop_last: bool, channels_last: bool, shard: tuple[int, int]
    ) -> Iterator[Batch]:
        for batch in self._pass(seed):
            count = len(batch.ids)
            if count <= shard[0] or (drop_last and count < shard[1]):
                continue
            own = self._moved(take_rows(batch, own_rows(count, shard)) if shard[1] > 1 else batch)
            yield own._replace(inputs=to_channels_last(own.inputs)) if channels_last else own

    def _pass(self, seed: int | None) -> Iterator[Batch]:
        """Whole batches, checked, where the source left them."""
        first, number = 0, 0
        for number, batch in enumerate(itertools.islice(_opened(self.source, seed), self._num_batches), start=1):
            where = f"batch {number - 1} of {self.name}"
            yield (read := read_batch(batch, where, num_classes=self.num_classes, first_id=first))
            first += len(read.ids)
        self._check_end(number)

    def _check_end(self, number: int) -> None:
        if number == 0:
            raise DataError(f"{self.name} gave no batch. {_AGAIN}")
        if self._num_batches is not None and number < self._num_batches:
            raise DataError(
                f"{self.name} ended after {number} of {self._num_batches} batches. Lower num_batches. {_AGAIN}"
            )

    def _moved(self, value: Any) -> Any:
        if self.device is None:
            return value
        # only there is it known to be safe, and of use with a DataLoader(pin_memory=True)
        beside = self.device.type == "cuda"
        return map_tensors(lambda tensor: tensor.to(self.device, non_blocking=beside), value)

    def _check(self) -> None:
        if self.split not in ("", *SPLITS):
            raise ConfigError(f"no split '{self.split}'. Use one of: {', '.join(SPLITS)}, or leave it out.")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ConfigError(
                f"there are {len(self.class_names)} class names for {self.num_classes} classes. "
                "Name every class, or none."
            )
        if self._num_batches is not None and self._num_batches < 1:
            raise ConfigError(f"a pass of {self._num_batches} batches is none. Give 1 or more.")


def as_samples(data: Any, *, split: str = "") -> Samples:
    """Samples as they are, and anything else as a ``Stream``.

    Args:
        data: samples, or what a ``Stream`` takes.
        split: what a new stream is called; samples keep their own.

    Raises:
        DataError: it is neither, or it is several splits.
    """
    if isinstance(data, Splits):
        raise DataError(f"{data.name} is several splits. Give one of them: data.train, data.val or data.test.")
    # asked of the type: isinstance(…, Samples) would have Python 3.11 open a source for its example inputs
    return data if hasattr(type(data), "batches") else Stream(data, split=split)


def as_splits(data: Any) -> Splits:
    """Splits as they are, and anything else as a training split.

    Args:
        data: splits, a mapping from ``"train"``, ``"val"`` and ``"test"`` to what ``as_samples`` takes, or the
            training data alone.

    Raises:
        DataError: a mapping has no training data or an unknown split, or a part is no samples.
    """
    if isinstance(data, Splits):
        return data
    if not isinstance(data, Mapping):
        return Splits(train=as_samples(data, split="train"))
    if data.get("train") is None or not set(data) <= set(SPLITS):
        raise DataError(
            f"there are splits called {', '.join(map(str, data))}. Give 'train', and 'val' and 'test' if any."
        )
    parts = {split: as_samples(part, split=split) for split, part in data.items() if part is not None}
    return Splits(parts["train"], parts.get("val"), parts.get("test"))


def _check_source(source: Any) -> None:
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise DataError(
            f"a {type(source).__name__} gives single samples. Wrap it: DataLoader(data, batch_size=128, shuffle=True)."
        )
    pair = isinstance(source, tuple) and any(isinstance(part, (Tensor, np.ndarray)) for part in source)
    if pair or isinstance(source, (Tensor, np.ndarray)):
        raise DataError("tensors are no batches. Hold them in TensorSet(inputs, labels), or give a list of batches.")
    if isinstance(source, (str, bytes, Mapping)) or not (isinstance(source, Iterable) or callable(source)):
        raise DataError(f"a {type(source).__name__} is no stream of batches. {_AGAIN}")


def _check_sampler(source: Any, shard: tuple[int, int]) -> None:
    samplers = (getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None))
    if shard[1] > 1 and any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        raise ConfigError(
            f"the DataLoader has a DistributedSampler, and each of the {shard[1]} processes keeps its own rows of each "
            "batch already: samples would be lost. Give a DataLoader without it."
        )


def _opened(source: Any, seed: int | None) -> Iterator[Any]:
    """Iterate over a source, opened and asked for the first batch under a seed, if there is one."""
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # the CPU's alone, unlike torch.manual_seed
        # here a loader draws the seeds of its workers and, with the first batch, that of its order
        iterator = _iterator(source)
        first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator


def _iterator(source: Any) -> Iterator[Any]:
    made = source if isinstance(source, Iterable) else source()
    if not isinstance(made, Iterable):
        raise DataError(f"the function that makes the stream gave a {type(made).__name__}. {_AGAIN}")
    return iter(made)


def _num_samples(source: Any, num_batches: int | None) -> int | None:
    """How many samples a pass over a source has, where that can be known without one."""
    if isinstance(source, (list, tuple)):
        return sum(len(read_batch(batch, f"batch {i}").ids) for i, batch in enumerate(source[:num_batches]))
    if not isinstance(source, DataLoader) or source.batch_size is None:
        return None
    over = source.dataset if isinstance(source.dataset, IterableDataset) else source.sampler
    if not isinstance(over, Sized):
        return None
    found, size = len(over), source.batch_size
    whole = found // size * size if source.drop_last else found
    return whole if num_batches is None else min(whole, num_batches * size)
