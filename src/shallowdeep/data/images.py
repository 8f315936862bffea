"""Images with labels on one device; batches, crops, flips and normalisation happen there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from shallowdeep.data.labels import LabelTree
from shallowdeep.data.stratify import stratified_split
from shallowdeep.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random changes of training images: a shifted crop, then a left-right flip of half of them.

    Args:
        pad: black pixels put around the image before a window of its own size is cut out at random.
        flip: whether to mirror each image with probability one half.

    Raises:
        ConfigError: ``pad`` is negative.
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self):
        if self.pad < 0:
            raise ConfigError(f"cannot pad by {self.pad} pixels. Give 0 (no crop) or more.")


class Batch(NamedTuple):
    """Some samples, ready for a network.

    ``inputs`` are normalised; ``labels`` and ``ids`` are int64.
    """

    inputs: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]
    ids: Int[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one split, uint8 on one device, with labels.

    Args:
        images: pixel values 0 to 255.
        labels: in ``0 .. len(class_names) - 1``.
        ids: tell the samples of one source apart, e.g. their row numbers; subsets keep them.
        mean: one per channel, of pixels scaled to 0 .. 1; what batches subtract.
        std: one per channel, of pixels scaled to 0 .. 1; what batches divide by.
        class_names: one per label.
        name: of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        tree: the labels' two levels, where the data set has two.

    Raises:
        DataError: the parts do not fit together.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    name: str = "images"
    split: str = "train"
    tree: LabelTree | None = None

    def __post_init__(self):
        _check_images(self)
        _check_labels(self)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many labels there are, named ones included that no sample has."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where the images are, and the batches will be."""
        return self.images.device

    @property
    def example_inputs(self) -> Float[Tensor, "b c h w"]:
        """The first four images, normalised (fewer if there are fewer)."""
        return self._normalise(self.images[:4])

    def to(self, device: str | torch.device) -> ImageSet:
        """The same samples on another device."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            ids=self.ids.to(device),
        )

    def subset(self, indices: Sequence[int] | Int[Tensor, " k"], split: str | None = None) -> ImageSet:
        """Some of the samples, in the order given; their ids travel along.

        Args:
            indices: positions in this set (not ids), none twice.
            split: what the subset is called; this set's split when not given.

        Raises:
            DataError: a position is outside the set or given twice.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise DataError(f"no sample {int(outside[0])}: the set has {len(self)}, counted from 0.")
        return replace(
            self,
            images=self.images.index_select(0, chosen),
            labels=self.labels.index_select(0, chosen),
            ids=self.ids.index_select(0, chosen),
            split=split or self.split,
        )

    def sample(self, n: int, seed: int = 0) -> ImageSet:
        """At most ``n`` samples with the classes in proportion, in their order.

        Args:
            n: how many; the set itself when it has no more.
            seed: the same seed picks the same samples.
        """
        if n >= len(self):
            return self
        return self.subset(stratified_split(self.labels, n, seed)[1])

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
    ) -> Iterator[Batch]:
        """All samples once, normalised, on the set's device.

        The same seed gives the same batches on every device. An image meets the same crop and flip
        whatever the batch size. PyTorch's global random state is neither read nor moved.

        Args:
            batch_size: samples per batch; the last batch may be smaller.
            augment: random crops and flips; needs a seed.
            seed: of this pass, for the order, crops and flips; ``None`` keeps the set's order.
            drop_last: leave out a smaller last batch.
            channels_last: give ``inputs`` in that memory format.

        Raises:
            ConfigError: the batch size is below 1, or there is an augmentation without a seed.
        """
        if batch_size < 1:
            raise ConfigError(f"a batch of {batch_size} samples is none. Give 1 or more.")
        if augment is not None and seed is None:
            raise ConfigError(f"{augment} without a seed would differ in every run. Give a seed.")
        count = self.num_batches(batch_size, drop_last)
        parts = (slice(i * batch_size, (i + 1) * batch_size) for i in range(count))
        format = torch.channels_last if channels_last else torch.contiguous_format
        if seed is None:
            pixels = ((self.images[part], part) for part in parts)
        else:
            pixels = self._shuffled(parts, augment or Augmentation(), seed)
        return (
            Batch(
                # reordered while still bytes, which moves a quarter as much
                self._normalise(images.contiguous(memory_format=format)),
                self.labels[rows].long(),
                self.ids[rows].long(),
            )
            for images, rows in pixels
        )

    def _shuffled(
        self, parts: Iterator[slice], augment: Augmentation, seed: int
    ) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Int[Tensor, " b"]]]:
        # drawn on the CPU for the whole pass: there every device sees the same numbers, and none waits
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=random).to(self.device)
        shifts = torch.randint(2 * augment.pad + 1, (len(self), 2), generator=random).to(self.device)
        flips = (torch.rand(len(self), generator=random) < 0.5 * augment.flip).to(self.device)
        for part in parts:
            rows = order[part]
            images = self.images.index_select(0, rows)
            if augment != Augmentation():
                images = _crop_and_flip(images, shifts[part], flips[part], augment.pad)
            yield images, rows

    def _normalise(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (self.mean, self.std))
        # (x / 255 - mean) / std as one product and one sum, in place
        return images.float().mul_(1 / (255 * std)).sub_(mean / std)

    def md5(self) -> dict[str, str]:
        """Fingerprints of the pixels and of the labels, to compare with those others publish.

        Returns:
            ``images``: of the uint8 values in the order sample, row, column, channel; ``labels``: of the
            labels as uint8 (as int64 with more than 256 classes).
        """
        pixels = hashlib.md5(usedforsecurity=False)
        for part in self.images.cpu().split(1000):  # a copy of a part only: the set may fill the memory
            pixels.update(part.permute(0, 2, 3, 1).contiguous().numpy().data)
        width = torch.uint8 if self.num_classes <= 256 else torch.int64
        labels = hashlib.md5(self.labels.cpu().to(width).numpy().data, usedforsecurity=False)
        return {"images": pixels.hexdigest(), "labels": labels.hexdigest()}


@dataclass(frozen=True, eq=False)
class Splits:
    """One data set in three parts, with the augmentation that suits its training part.

    Args:
        train: what networks learn from.
        val: what thresholds are chosen on.
        test: what is reported, and nothing else.
        augment: for ``train.batches``.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    augment: Augmentation

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
    def example_inputs(self) -> Float[Tensor, "b c h w"]:
        """The first four training images, normalised."""
        return self.train.example_inputs

    def to(self, device: str | torch.device) -> Splits:
        """The same splits on another device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def _crop_and_flip(
    images: UInt8[Tensor, "b c h w"], shifts: Int[Tensor, "b 2"], flips: Bool[Tensor, " b"], pad: int
) -> UInt8[Tensor, "b c h w"]:
    """Cut a window of the images' size out of the padded images, mirrored where ``flips`` says so."""
    b, c, h, w = images.shape
    columns = torch.arange(w, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + shifts[:, 1:]
    rows = torch.arange(h, device=images.device) + shifts[:, :1]
    # one gather over flat pixels: a batch of 128 in 0.6 ms on one core, indexing rows and columns 4 ms
    pixels = (rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]).view(b, 1, h * w).expand(b, c, h * w)
    return F.pad(images, (pad, pad, pad, pad)).flatten(2).gather(2, pixels).view(b, c, h, w)


def _check_images(data: ImageSet) -> None:
    images, n = data.images, len(data.labels)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"images are {images.dtype} of shape {tuple(images.shape)}. "
            "Give uint8 pixels 0 to 255, of shape (samples, channels, height, width)."
        )
    if n == 0 or len(images) != n or len(data.ids) != n:
        raise DataError(
            f"there are {len(images)} images, {n} labels and {len(data.ids)} ids. "
            "Give one label and one id for each image, and one image at least."
        )
    channels = images.shape[1]
    if len(data.mean) != channels or len(data.std) != channels or min(data.std) <= 0:
        raise DataError(
            f"mean {data.mean} and std {data.std} do not fit {channels} channels. "
            "Give one mean and one std above 0 for each channel."
        )
    if data.split not in SPLITS:
        raise DataError(f"no split '{data.split}'. Use one of: {', '.join(SPLITS)}.")


def _check_labels(data: ImageSet) -> None:
    for what, values in (("labels", data.labels), ("ids", data.ids)):
        if values.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64) or values.ndim != 1:
            raise DataError(f"{what} are {values.dtype} of shape {tuple(values.shape)}. Give int64, one per image.")
    low, high = (int(value) for value in data.labels.aminmax())
    if low < 0 or high >= data.num_classes:
        raise DataError(
            f"label {low if low < 0 else high} has no class name: there are {data.num_classes}. "
            "Count labels from 0, and name every class."
        )
    values, counts = data.ids.unique(return_counts=True)
    if len(values) != len(data):
        raise DataError(f"id {int(values[counts.argmax()])} is there twice. Give every sample its own id.")
    if data.tree and data.class_names not in (data.tree.fine_names, data.tree.coarse_names):
        raise DataError(
            f"the {data.num_classes} class names are neither the label tree's {data.tree.num_fine} fine nor "
            f"its {data.tree.num_coarse} coarse names. Take them from the tree, or give no tree."
        )
