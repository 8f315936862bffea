"""The parts of a data set become splits: held decoded where they are small, else decoded as they are needed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.files.cache import Rows, kept_rows
from shallowdeep.data.files.decode import image_size
from shallowdeep.data.files.parquet import decode_part
from shallowdeep.data.files.stores import Part
from shallowdeep.data.images import ImageSet
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.samples import Augmentation, IndexedSamples, Splits
from shallowdeep.data.stratify import stratified_split
from shallowdeep.errors import ConfigError

LARGEST = 96  # pixels of a side: larger images are not held decoded
_MOST_BYTES = 4 * 2**30  # of one split's pixels
_LOOKED_AT = 64  # images whose size decides


@dataclass(frozen=True, slots=True)
class Look:
    """How a data set's images are shown to a network, where they are held decoded.

    Args:
        mean: one per channel, of pixels scaled to 0 .. 1.
        std: one per channel, of pixels scaled to 0 .. 1.
        augment: what suits its training images; ``None``: a flip, and a shift by an eighth of the side.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    augment: Augmentation | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """How much is held out of the training images.

    Args:
        asked: images for validation; 0: no validation split; ``None``: ``default``.
        default: where nothing is asked for; ``None``: a tenth.
        seed: of the validation images.
    """

    asked: int | None = None
    default: int | None = None
    seed: int = 0

    def num_val(self, available: int) -> int:
        """How many images are held out of so many.

        Raises:
            ConfigError: nothing is left to train on.
        """
        asked = self.asked if self.asked is not None else self.default or max(1, available // 10)
        if not 0 <= asked < available:
            raise ConfigError(
                f"cannot hold out {asked} of {available} training images. Take from 0 (none) to {available - 1}."
            )
        return asked


def assemble(
    name: str,
    parts: Mapping[str, Part],
    *,
    labels: str = "fine",
    look: Look,
    held: Held,
    preprocessing: Preprocessing | None = None,
) -> Splits:
    """Splits of a data set that was read from files.

    Where there is a training part alone, a tenth of it is held out for testing, the same for every seed. Where
    there is no validation part, that is held out of the training part, or left out where nothing is to be.

    Args:
        name: of the data set.
        parts: ``"train"``, and ``"val"`` and ``"test"`` where the data set has them.
        labels: which label set.
        look: for images that are held decoded.
        held: how much is held out for validation.
        preprocessing: decode images as they are needed, and make them so; ``None``: only where they differ in
            size, or are large; then ImageNet's.

    Raises:
        ConfigError: validation images are asked for (or that there be none) where there are some, or too many.
        DataError: an image cannot be decoded, or the parts do not fit together.
    """
    fine = parts["train"].labels["fine"]
    if preprocessing is None and _fits_decoded(parts["train"]):
        images = {split: _decoded(name, part, labels, split, look) for split, part in parts.items()}
        augment = look.augment or Augmentation(pad=images["train"].images.shape[-1] // 8, flip=True)
        return split_up(images, fine, held, augment)
    shape = preprocessing or Preprocessing()
    encoded = {split: _encoded(name, part, labels, split, shape) for split, part in parts.items()}
    return split_up(encoded, fine, held, Augmentation(flip=True, min_area=0.08))  # torchvision's share


def split_up(
    sets: Mapping[str, IndexedSamples], fine: Int[Tensor, " n"], held: Held, augment: Augmentation | None
) -> Splits:
    """Hold out what is not there.

    Args:
        sets: ``"train"``, and ``"val"`` and ``"test"`` where there are such.
        fine: the training samples' labels, of the finer label set: one on coarse labels is then validated on the
            same samples.
        held: how much is held out for validation; where that is nothing, ``val`` is ``None``.
        augment: of the training samples.

    Raises:
        ConfigError: validation samples are asked for (or that there be none) where there are some, or too many.
    """
    train, val, test = sets["train"], sets.get("val"), sets.get("test")
    if val is not None:
        if held.asked is not None:
            raise ConfigError(f"{train.name} has {len(val)} validation samples of its own. Leave val_size out.")
        return Splits(train, val, test, augment)
    rest = torch.arange(len(fine))
    if test is None:
        rest, tested = stratified_split(fine, Held().num_val(len(fine)), seed=0)
        test = train.subset(tested, split="test")
    kept, chosen = stratified_split(fine[rest], held.num_val(len(rest)), held.seed)
    val = train.subset(rest[chosen], split="val") if len(chosen) else None
    return Splits(train.subset(rest[kept]), val, test, augment)


def image_set(name: str, rows: Rows, labels: str, split: str, look: Look) -> ImageSet:
    """Decoded rows as a set on the CPU; ids are row numbers."""
    return ImageSet(
        images=rows.images,
        labels=rows.labels[labels],
        ids=torch.arange(len(rows.images)),
        mean=look.mean,
        std=look.std,
        class_names=rows.names[labels],
        name=name,
        split=split,
        tree=_tree(rows),
    )


def _decoded(name: str, part: Part, labels: str, split: str, look: Look) -> ImageSet:
    kind = re.sub(r"\W.*", "", name)  # a path is no file's name
    pixels = kept_rows(
        f"{kind}-{split}", part.store.key(), lambda: decode_part(part._replace(labels={}, names={}), f"{name} {split}")
    )
    return image_set(name, Rows(pixels.images, part.labels, part.names), labels, split, look)


def _encoded(name: str, part: Part, labels: str, split: str, preprocessing: Preprocessing) -> EncodedImages:
    return EncodedImages(
        store=part.store,
        labels=part.labels[labels],
        ids=torch.arange(len(part.store)),
        preprocessing=preprocessing,
        class_names=part.names[labels],
        name=name,
        split=split,
        tree=_tree(part),
    )


def _tree(part: Rows | Part) -> LabelTree | None:
    if "coarse" not in part.labels:
        return None
    return LabelTree.from_pairs(part.labels["fine"], part.labels["coarse"], part.names["fine"], part.names["coarse"])


def _fits_decoded(part: Part) -> bool:
    """Whether the first images are small and of one size, and all together no more than the memory likes."""
    contents = enumerate(itertools.islice(part.store.contents(), _LOOKED_AT))
    sizes = {image_size(content, part.store.where(row)) for row, content in contents}
    if len(sizes) != 1:
        return False
    height, width = sizes.pop()
    return max(height, width) <= LARGEST and 3 * height * width * len(part.store) <= _MOST_BYTES
