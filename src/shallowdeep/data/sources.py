"""Data sets by name: found, read, and split into train, val and test."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from shallowdeep.data.assemble import Held, Look, assemble, image_set, split_up
from shallowdeep.data.files.cache import Rows
from shallowdeep.data.files.folders import read_folder
from shallowdeep.data.files.parquet import find_shards, label_columns, read_part, read_split, sort_shards
from shallowdeep.data.files.stores import Part
from shallowdeep.data.files.tiny_imagenet import read_tiny_imagenet
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.samples import Augmentation, Splits
from shallowdeep.data.stratify import stratified_split
from shallowdeep.data.text import TEXTS, load_text
from shallowdeep.errors import ConfigError, DataError, UnknownName, require


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set comes from and how it is prepared.

    Args:
        look: how its images are shown to a network.
        hub: dataset repository on the Hugging Face hub; ``None``: the digits of scikit-learn.
        columns: label set -> its column in the files; the first is the default.
        val_size: training images held out for validation; ``None``: a tenth.
    """

    look: Look
    hub: str | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: {"fine": "label"})
    val_size: int | None = None


_FLIP_AND_CROP = Augmentation(pad=4, flip=True)
SOURCES: dict[str, Source] = {
    # no flip: a mirrored 2 is no 2. Mean and std of all 1,797 enlarged images, to three places.
    "digits": Source(Look((0.305,) * 3, (0.324,) * 3, Augmentation(pad=4)), val_size=180),
    # ImageNet's constants, which the Shallow-Deep authors' code uses here, so that results compare
    "cifar10": Source(Look(augment=_FLIP_AND_CROP), "uoft-cs/cifar10"),
    "cifar100": Source(
        Look((0.507, 0.487, 0.441), (0.267, 0.256, 0.276), _FLIP_AND_CROP),
        "uoft-cs/cifar100",
        {"fine": "fine_label", "coarse": "coarse_label"},
    ),
    "tinyimagenet": Source(
        Look((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), Augmentation(pad=8, flip=True)),
        "zh-plus/tiny-imagenet",
    ),
}
KINDS = ("folder", "parquet", "hub")
_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
_HELD_BACK = {"train": _WORDS["train"], "test": _WORDS["val"]}  # Tiny ImageNet's own test images have no labels


def data_sets() -> list[str]:
    """The names that ``load_data`` knows, beside ``folder:…``, ``parquet:…`` and ``hub:…``."""
    return sorted([*SOURCES, *TEXTS])


def load_data(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    val_size: int | None = None,
    labels: str = "fine",
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Splits:
    """A data set by name, in up to three splits that share no sample.

    ``digits`` needs no download. The other names are read from ``<data_dir>/<name>``, or from the folder that
    the environment variable SHALLOWDEEP_DATA names, or from the Hugging Face hub, in this order. Decoded
    images are kept under the user's cache folder (or SHALLOWDEEP_CACHE) and checked when read again.

    Data of your own: ``folder:PATH`` is a folder of class folders, or of ``train``, ``val`` and ``test`` with class
    folders each; ``parquet:PATH`` one of Parquet files with images and labels, as the ``datasets`` library writes
    them; ``hub:OWNER/NAME`` (or ``hub:OWNER/NAME/FOLDER``) is downloaded and read in the same way. Without a
    validation split, a tenth of the training samples is held out, without either, another tenth for testing;
    with a validation and no test split, ``test`` is ``None``. Images of one size up to 96 pixels are held decoded
    (``ImageSet``); others are decoded as they are needed (``EncodedImages``).

    ``tinyimagenet`` is also read as its makers pack it, ``tiny-imagenet-200.zip`` or the folder out of it; the
    makers' validation images are the test split, as in papers. ``trec`` are questions as token ids.

    Args:
        name: one of ``data_sets()``, or data of your own.
        data_dir: folder of Parquet shards ``<name>/<split>-00000-of-0000N.parquet``.
        val_size: training samples held out for validation, fine classes in proportion; a tenth (of
            digits 180) when not given; 0: none, the network learns from all of them and ``val`` is ``None``.
        labels: ``"fine"``, or ``"coarse"`` where the data set has two levels.
        seed: of the validation split and of nothing else; runs compare only under one.
        preprocessing: decode images as they are needed and make them so, for a pretrained network.
        image_column: where Parquet files of your own have their images; ``None``: ``img`` or ``image``.
        label_column: where they have their labels; ``None``: ``label``, ``labels`` or ``fine_label``.

    Returns:
        Splits on the CPU; ids are row numbers in the source's training and test data.

    Raises:
        UnknownName: there is no such data set, or it has no such labels.
        ConfigError: ``val_size`` leaves nothing to train on, or the data set has validation samples of its own; or an
            argument does not apply to this data set.
        DataError: the files are missing or damaged.
        MissingExtra: a library that reads them is not installed.

    Deviation: the authors' code also changes Tiny ImageNet's colours at random in training; this does not.
    """
    kind, _, place = name.partition(":")
    _check_arguments(name, kind, preprocessing, (image_column, label_column))
    if name in TEXTS:
        return load_text(name, _folder(name, TEXTS[name].hub, data_dir), labels=labels, held=Held(val_size, seed=seed))
    if kind in KINDS:
        source, parts = Source(Look()), _read_own(kind, place, image_column, label_column)
    else:
        source = SOURCES[name]
        if labels not in source.columns:
            raise UnknownName(f"label set of {name}", labels, source.columns)
        if preprocessing is None and name != "tinyimagenet":
            return _held_decoded(name, source, data_dir, labels, Held(val_size, source.val_size, seed))
        parts = _read_parts(name, source, data_dir)
    if labels not in parts["train"].labels:
        raise UnknownName(f"label set of {name}", labels, parts["train"].labels)
    return assemble(
        name, parts, labels=labels, look=source.look, held=Held(val_size, seed=seed), preprocessing=preprocessing
    )


def _check_arguments(
    name: str, kind: str, preprocessing: Preprocessing | None, columns: tuple[str | None, str | None]
) -> None:
    if kind not in KINDS if ":" in name else name not in (*SOURCES, *TEXTS):
        raise UnknownName("data set", name, [*SOURCES, *TEXTS, *(f"{kind}:…" for kind in KINDS)])
    if name.endswith(":"):
        raise ConfigError(f"'{name}' names no place. Write folder:PATH, parquet:PATH or hub:OWNER/NAME.")
    if any(columns) and kind not in ("parquet", "hub"):
        raise ConfigError(f"{name} has no columns to choose. Leave out image_column and label_column.")
    if preprocessing is not None and (name == "digits" or name in TEXTS):
        raise ConfigError(f"{name} holds no files of images to preprocess. Leave preprocessing out.")


def _held_decoded(
    name: str, source: Source, data_dir: str | os.PathLike[str] | None, labels: str, held: Held
) -> Splits:
    train, test = _read_digits() if source.hub is None else _read_files(name, source, data_dir)
    sets = {
        split: image_set(name, rows, labels, split, source.look) for split, rows in (("train", train), ("test", test))
    }
    return split_up(sets, train.labels["fine"], held, source.look.augment)


def _read_own(kind: str, place: str, image_column: str | None, label_column: str | None) -> dict[str, Part]:
    if kind == "folder":
        return read_folder(Path(place).expanduser(), _WORDS)
    folder = _snapshot(place) if kind == "hub" else Path(place).expanduser()
    if not folder.exists():
        raise DataError(f"no folder {folder}. Name one that holds Parquet files.")
    return _read_shards(sort_shards(folder, _WORDS), image_column, label_column)


def _read_shards(
    shards: Mapping[str, list[Path]], image_column: str | None = None, label_column: str | None = None
) -> dict[str, Part]:
    columns = label_columns(shards["train"][0], label_column)
    train = read_part(shards["train"], columns, image_column=image_column, any_labels=True)
    others = {
        split: read_part(files, columns, image_column=image_column, names=train.names, any_labels=True)
        for split, files in shards.items()
        if split != "train"
    }
    return {"train": train} | {split: part for split, part in others.items() if _has_labels(part, split)}


def _has_labels(part: Part, split: str) -> bool:
    """Whether a split has them: of hub data sets that are competitions, the test labels are all -1."""
    if (part.labels["fine"] != -1).any():
        return True
    warnings.warn(f"{split} is left out: its labels are all -1, which means none.", stacklevel=2)
    return False


def _read_parts(name: str, source: Source, data_dir: str | os.PathLike[str] | None) -> dict[str, Part]:
    """Train and test of a named data set, not decoded."""
    if name == "tinyimagenet":
        root = Path(data_dir or os.environ.get("SHALLOWDEEP_DATA") or "/nowhere").expanduser()
        found = read_tiny_imagenet(root) or read_tiny_imagenet(root / name)
        return found or _read_shards(sort_shards(_folder(name, source.hub, data_dir), _HELD_BACK))
    folder = _folder(name, source.hub, data_dir)
    return {split: read_part(find_shards(folder, split), source.columns) for split in ("train", "test")}


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
    folder = _folder(name, source.hub, data_dir)
    return read_split(name, folder, "train", source.columns), read_split(name, folder, "test", source.columns)


def _folder(name: str, hub: str | None, data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir:
        folder = Path(data_dir).expanduser() / name
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}. Let --data-dir (data_dir) name the folder that holds '{name}/', or leave it "
                f"out to download {hub}."
            )
        return folder
    folder = Path(os.environ.get("SHALLOWDEEP_DATA", "")).expanduser() / name
    if os.environ.get("SHALLOWDEEP_DATA") and folder.is_dir():
        return folder
    return _download(
        str(hub), f"Set SHALLOWDEEP_DATA or --data-dir to a folder that holds '{name}/train-00000-of-0000N.parquet'."
    )


def _snapshot(place: str) -> Path:
    owner, _, rest = place.partition("/")
    repository, _, folder = rest.partition("/")
    if not owner or not repository:
        raise ConfigError(f"hub:{place} names no data set of the hub. Write hub:OWNER/NAME.")
    found = _download(f"{owner}/{repository}", "Look the name up on huggingface.co/datasets.", folder)
    return found / folder


def _download(repository: str, advice: str, folder: str = "") -> Path:
    hub = require("huggingface_hub", extra="data")
    pattern = f"{folder}/*.parquet" if folder else "*.parquet"
    try:
        return Path(hub.snapshot_download(repository, repo_type="dataset", allow_patterns=pattern))
    except Exception as error:  # of whichever HTTP library this version of the hub client stands on
        raise DataError(f"cannot download {repository} ({type(error).__name__}: {error}). {advice}") from error
