"""Images that stay compressed, and are decoded by worker processes as batches are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shallowdeep.data.files.decode import decode
from shallowdeep.data.files.stores import Store
from shallowdeep.data.labelled import check_labelled, check_pass, labels_md5, own_parts, positions
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.normalise import normaliser
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.samples import Augmentation, Batch
from shallowdeep.data.stratify import stratified_split
from shallowdeep.errors import DataError, ShallowDeepError
from shallowdeep.processes import shard


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Compressed images of one split, of any sizes, with labels.

    Args:
        store: the compressed images: ``FileStore`` of paths, ``ParquetStore``, ``ZipStore``.
        labels: in ``0 .. len(class_names) - 1``.
        ids: the row of each sample in the store; subsets keep them.
        preprocessing: how an image becomes a square of pixels.
        class_names: one per label.
        name: of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        tree: the labels' two levels, where the data set has two.
        num_workers: processes that decode; ``None``: as many as there are cores for each process that trains, up to
            eight; 0: none, this process decodes.
        device: where batches come.

    Raises:
        DataError: the parts do not fit together.
    """

    store: Store
    labels: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    name: str = "images"
    split: str = "train"
    tree: LabelTree | None = None
    num_workers: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self):
        if len(self.ids) != len(self.labels) or not len(self.labels):
            raise DataError(
                f"there are {len(self.labels)} labels and {len(self.ids)} ids. "
                "Give one of each for an image, and one image at least."
            )
        check_labelled(
            self.labels,
            self.ids,
            class_names=self.class_names,
            num_classes=self.num_classes,
            split=self.split,
            tree=self.tree,
        )
        low, high = (int(row) for row in self.ids.aminmax())
        if low < 0 or high >= len(self.store):
            raise DataError(
                f"no row {low if low < 0 else high}: the store has {len(self.store)} images. Ids are its rows."
            )
        self.store.prepare()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many labels there are, named ones included that no sample has."""
        return len(self.class_names)

    @property
    def example_inputs(self) -> Float[Tensor, "b 3 s s"]:
        """The first four images, decoded and normalised (fewer if there are fewer)."""
        images = _pixels(self._reader(None, None), self.ids[:4].tolist()).to(self.device)
        return normaliser(self.preprocessing.mean, self.preprocessing.std, self.device)(images)

    def to(self, device: str | torch.device) -> EncodedImages:
        """The same samples, whose batches come on another device."""
        return replace(self, device=torch.device(device))

    def subset(self, indices: Sequence[int] | Int[Tensor, " k"], split: str | None = None) -> EncodedImages:
        """Some of the samples, in the order given; their ids travel along.

        Args:
            indices: positions in this set (not ids), none twice.
            split: what the subset is called; this set's split when not given.

        Raises:
            DataError: a position is outside the set or given twice.
        """
        chosen = positions(indices, len(self))
        return replace(self, labels=self.labels[chosen], ids=self.ids[chosen], split=split or self.split)

    def sample(self, n: int, seed: int = 0) -> EncodedImages:
        """At most ``n`` samples with the classes in proportion, in their order.

        Args:
            n: how many; the set itself when it has no more.
            seed: the same seed picks the same samples.
        """
        return self if n >= len(self) else self.subset(stratified_split(self.labels, n, seed)[1])

    def num_batches(self, batch_size: int, drop_last: bool = False) -> int:
        """How many batches ``batches`` gives."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

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
        """All samples once, decoded, preprocessed and normalised, on the set's device.

        The same seed gives the same order, windows and flips for any batch size, number of workers and number of
        processes: each image draws from the seed and its id. PyTorch's global random state is neither read
        nor moved.

        Args:
            batch_size: samples per batch; the last batch may be smaller.
            augment: random windows, shifts and flips; needs a seed.
            seed: of this pass, for the order and the augmentation; ``None`` keeps the set's order.
            drop_last: leave out a smaller last batch.
            channels_last: give ``inputs`` in that memory format.
            shard: ``(rank, number of processes)``: give only this process's share of each batch, and decode
                no other.

        Raises:
            ConfigError: the batch size is below 1, or there is an augmentation without a seed.
            DataError: an image cannot be decoded, or a worker died.
        """
        check_pass(batch_size, augment, seed)
        parts = list(own_parts(len(self), batch_size, drop_last, shard))
        if seed is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rows = [order[part] for part in parts]
        return self._batches(rows, self._reader(augment, seed), channels_last)

    def _batches(self, rows: list[Tensor], reader: _Reader, channels_last: bool) -> Iterator[Batch]:
        format = torch.channels_last if channels_last else torch.contiguous_format
        normalise = normaliser(self.preprocessing.mean, self.preprocessing.std, self.device)
        for chosen, images in zip(rows, self._decoded(rows, reader), strict=True):
            inputs = images.to(self.device, non_blocking=self.device.type == "cuda")
            labels, ids = (values[chosen].long().to(self.device) for values in (self.labels, self.ids))
            yield Batch(normalise(inputs.contiguous(memory_format=format)), labels, ids)

    def _decoded(self, rows: list[Tensor], reader: _Reader) -> Iterator[UInt8[Tensor, "b 3 s s"]]:
        share = max(1, _cores() // shard()[1])
        wanted = min(8, share) if self.num_workers is None else self.num_workers
        workers = wanted if len(rows) > 1 else 0
        asked: list[Any] = [self.ids[chosen].tolist() for chosen in rows]
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=asked,
            num_workers=min(workers, len(rows)),
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it draws a seed for its workers: not from the global state
        )
        for found in _surviving(loader):
            if isinstance(found, str):
                raise DataError(found)
            yield found

    def _reader(self, augment: Augmentation | None, seed: int | None) -> _Reader:
        return _Reader(self.store, self.preprocessing, augment or Augmentation(), seed)

    def md5(self) -> dict[str, str]:
        """Fingerprints of the compressed images and of the labels.

        Returns:
            ``images``: of the bytes of one image after the other; ``labels``: of the labels as uint8 (as int64
            with more than 256 classes).
        """
        digest = hashlib.md5(usedforsecurity=False)
        for row in self.ids.tolist():
            digest.update(self.store.read(row) or b"")
        return {"images": digest.hexdigest(), "labels": labels_md5(self.labels, self.num_classes)}


@dataclass(frozen=True)
class _Reader(Dataset):
    """Decodes a batch in whichever process asks for it."""

    store: Store
    preprocessing: Preprocessing
    augment: Augmentation
    seed: int | None

    def __getitem__(self, rows: list[int]) -> UInt8[Tensor, "b 3 s s"] | str:
        try:
            return _pixels(self, rows)
        except ShallowDeepError as error:
            return str(error)  # raised in a worker it would come out with the worker's whole traceback as its message

    def read(self, row: int) -> UInt8[np.ndarray, "3 s s"]:
        """One image as it is seen in this pass."""
        image = decode(self.store.read(row), self.store.where(row))
        if self.seed is None or self.augment == Augmentation():
            return self.preprocessing.apply(image)
        return self.preprocessing.apply_randomly(image, self.augment, np.random.default_rng((self.seed % 2**64, row)))


def _pixels(reader: _Reader, rows: list[int]) -> UInt8[Tensor, "b 3 s s"]:
    return torch.from_numpy(np.stack([reader.read(row) for row in rows]))


def _cores() -> int:
    """Those that this process may use, which in a container are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_it_is(value: Any) -> Any:
    return value


def _surviving(loader: Iterable[Any]) -> Iterator[Any]:
    """Pass on what workers give; say what to do when the system ends one."""
    batches = iter(loader)
    while True:
        try:
            found = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            raise DataError(
                f"a process that decodes images died ({error}). Take fewer (num_workers), smaller batches, or "
                "num_workers=0: the memory, or that of /dev/shm, may be too small."
            ) from None
        yield found
