"""Data sets by name: found, decoded once, and split into train, val and test."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from shallowdeep.data.images import Augmentation, ImageSet, Splits
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.parquet import Rows, read_split
from shallowdeep.data.stratify import stratified_split
from shallowdeep.errors import ConfigError, DataError, UnknownName, require


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set comes from and how it is prepared.

    Args:
        mean: one per channel, of pixels scaled to 0 .. 1.
        std: one per channel, of pixels scaled to 0 .. 1.
        augment: what suits its training images.
        hub: dataset repository on the Hugging Face hub; ``None``: the digits of scikit-learn.
        columns: label set -> its column in the files; the first is the default.
        val_size: training images held out for validation; ``None``: a tenth.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation
    hub: str | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: {"fine": "label"})
    val_size: int | None = None


_FLIP_AND_CROP = Augmentation(pad=4, flip=True)
SOURCES: dict[str, Source] = {
    # no flip: a mirrored 2 is no 2. Mean and std of all 1,797 enlarged images, to three places.
    "digits": Source((0.305,) * 3, (0.324,) * 3, Augmentation(pad=4), val_size=180),
    # ImageNet's constants, which the Shallow-Deep authors' code uses here, so that results compare
    "cifar10": Source((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), _FLIP_AND_CROP, "uoft-cs/cifar10"),
    "cifar100": Source(
        (0.507, 0.487, 0.441),
        (0.267, 0.256, 0.276),
        _FLIP_AND_CROP,
        "uoft-cs/cifar100",
        {"fine": "fine_label", "coarse": "coarse_label"},
    ),
}


def data_sets() -> list[str]:
    """The names that ``load_data`` knows."""
    return sorted(SOURCES)


def load_data(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    val_size: int | None = None,
    labels: str = "fine",
    seed: int = 0,
) -> Splits:
    """A data set by name, in three splits that share no sample.

    ``digits`` needs no download. The others are read from ``<data_dir>/<name>``, or from the folder that
    the environment variable SHALLOWDEEP_DATA names, or from the Hugging Face hub, in this order. Decoded
    images are kept under the user's cache folder (or SHALLOWDEEP_CACHE) and checked when read again.

    Args:
        name: one of ``data_sets()``.
        data_dir: folder of Parquet shards ``<name>/<split>-00000-of-0000N.parquet``.
        val_size: training images held out for validation, fine classes in proportion; a tenth (of
            digits 180) when not given.
        labels: ``"fine"``, or ``"coarse"`` where the data set has two levels.
        seed: of the validation split and of nothing else; runs compare only under one.

    Returns:
        Splits on the CPU; ids are row numbers in the source's training and test data.

    Raises:
        UnknownName: there is no such data set, or it has no such labels.
        ConfigError: ``val_size`` leaves nothing to train on, or nothing to validate on.
        DataError: the files are missing or damaged.
        MissingExtra: a library that reads them is not installed.
    """
    if name not in SOURCES:
        raise UnknownName("data set", name, SOURCES)
    source = SOURCES[name]
    if labels not in source.columns:
        raise UnknownName(f"label set of {name}", labels, source.columns)
    train, test = _read_digits() if source.hub is None else _read_files(name, source, data_dir)
    num_val = _num_val(val_size, source, len(train.images))
    # always by the fine labels: a network on coarse ones is then validated on the same images
    kept, held = stratified_split(next(iter(train.labels.values())), num_val, seed)
    whole = _image_set(name, source, train, labels, "train")
    return Splits(
        train=whole.subset(kept),
        val=whole.subset(held, split="val"),
        test=_image_set(name, source, test, labels, "test"),
        augment=source.augment,
    )


def _num_val(asked: int | None, source: Source, available: int) -> int:
    if asked is None:
        return source.val_size or available // 10
    if not 0 < asked < available:
        raise ConfigError(f"cannot hold out {asked} of {available} training images. Take from 1 to {available - 1}.")
    return asked


def _image_set(name: str, source: Source, rows: Rows, labels: str, split: str) -> ImageSet:
    tree = None
    if "coarse" in rows.labels:
        tree = LabelTree.from_pairs(
            rows.labels["fine"], rows.labels["coarse"], rows.names["fine"], rows.names["coarse"]
        )
    return ImageSet(
        images=rows.images,
        labels=rows.labels[labels],
        ids=torch.arange(len(rows.images)),
        mean=source.mean,
        std=source.std,
        class_names=rows.names[labels],
        name=name,
        split=split,
        tree=tree,
    )


def _read_digits() -> tuple[Rows, Rows]:
    """The 1,797 digits of scikit-learn as 32x32 colour images, 360 of them for testing."""
    digits = require("sklearn.datasets", extra="demo").load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = pixels.round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    names = {"fine": tuple(str(digit) for digit in range(10))}
    train, test = stratified_split(labels, 360, seed=0)
    return Rows(images[train], {"fine": labels[train]}, names), Rows(images[test], {"fine": labels[test]}, names)


def _read_files(name: str, source: Source, data_dir: str | os.PathLike[str] | None) -> tuple[Rows, Rows]:
    folder = _folder(name, source, data_dir)
    return read_split(name, folder, "train", source.columns), read_split(name, folder, "test", source.columns)


def _folder(name: str, source: Source, data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir:
        folder = Path(data_dir).expanduser() / name
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}. Let --data-dir (data_dir) name the folder that holds '{name}/', or leave it "
                f"out to download {source.hub}."
            )
        return folder
    folder = Path(os.environ.get("SHALLOWDEEP_DATA", "")).expanduser() / name
    return folder if os.environ.get("SHALLOWDEEP_DATA") and folder.is_dir() else _download(name, source)


def _download(name: str, source: Source) -> Path:
    hub = require("huggingface_hub", extra="data")
    try:
        return Path(hub.snapshot_download(source.hub, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # of whichever HTTP library this version of the hub client stands on
        raise DataError(
            f"cannot download {source.hub} ({type(error).__name__}: {error}). Set SHALLOWDEEP_DATA or "
            f"--data-dir to a folder that holds '{name}/train-00000-of-0000N.parquet'."
        ) from error
