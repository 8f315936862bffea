"""Data sets by name: found, decoded once, and split into train, val and test."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from platformdirs import user_cache_dir
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor

from shallowdeep.data.images import Augmentation, ImageSet, Splits, stratified_split
from shallowdeep.data.labels import LabelTree
from shallowdeep.errors import ConfigError, DataError, FileFormatError, UnknownName, require
from shallowdeep.storage import load_tensors, save_tensors


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


class Rows(NamedTuple):
    """One split as its source has it; ``labels`` and ``names`` hold one entry for each label set."""

    images: UInt8[Tensor, "n c h w"]
    labels: dict[str, Int[Tensor, " n"]]
    names: dict[str, tuple[str, ...]]


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
    return _read_split(name, source, folder, "train"), _read_split(name, source, folder, "test")


def _folder(name: str, source: Source, data_dir: str | os.PathLike[str] | None) -> Path:
    given = data_dir or os.environ.get("SHALLOWDEEP_DATA")
    if not given:
        return _download(name, source)
    folder = Path(given).expanduser() / name
    if not folder.is_dir():
        origin = "data_dir" if data_dir else "SHALLOWDEEP_DATA"
        raise DataError(
            f"no folder {folder}. Let {origin} name the folder that holds '{name}/', or give neither "
            f"--data-dir nor SHALLOWDEEP_DATA to download {source.hub}."
        )
    return folder


def _download(name: str, source: Source) -> Path:
    hub = require("huggingface_hub", extra="data")
    try:
        return Path(hub.snapshot_download(source.hub, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # of whichever HTTP library this version of the hub client stands on
        raise DataError(
            f"cannot download {source.hub} ({type(error).__name__}: {error}). Set SHALLOWDEEP_DATA or "
            f"--data-dir to a folder that holds '{name}/train-00000-of-0000N.parquet'."
        ) from error


def _read_split(name: str, source: Source, folder: Path, split: str) -> Rows:
    """Take the split from the cache, or decode it and put it there."""
    shards = _find_shards(folder, split)
    cache = _cache_file(f"{name}-{split}", shards)
    rows = _load_rows(cache)
    if rows is None:
        rows = _decode(shards, source, f"{name} {split}")
        _save_rows(cache, rows)
    return rows


def _find_shards(folder: Path, split: str) -> list[Path]:
    """All shards of a split anywhere under a folder, in order, or an error that names the missing ones."""
    pattern = re.compile(rf"{split}-(\d{{5}})-of-(\d{{5}})\.parquet")
    found = {path.name: path for path in folder.rglob("*.parquet") if pattern.fullmatch(path.name)}
    if not found:
        raise DataError(f"no {split}-00000-of-0000N.parquet under {folder}. Copy or download it again.")
    count = max(name.rpartition("-")[2] for name in found).removesuffix(".parquet")
    wanted = [f"{split}-{shard:05d}-of-{count}.parquet" for shard in range(int(count))]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}. Copy or download the folder again.")
    return [found[name] for name in wanted]


def _cache_file(stem: str, shards: Sequence[Path]) -> Path:
    digest = hashlib.sha256()
    for shard in shards:
        with shard.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    folder = os.environ.get("SHALLOWDEEP_CACHE") or user_cache_dir("shallowdeep")
    return Path(folder) / f"{stem}-{digest.hexdigest()[:16]}.safetensors"


def _load_rows(path: Path) -> Rows | None:
    """Read what ``_save_rows`` wrote, or nothing where that is missing or not what was written."""
    try:
        tensors, info = load_tensors(path, kind="images")
    except FileFormatError:
        return None
    names = {space: tuple(words) for space, words in info.get("names", {}).items()}
    if set(tensors) != {"images", *names}:
        return None
    rows = Rows(tensors["images"], {space: tensors[space] for space in names}, names)
    return rows if info.get("sha256") == _digest(rows) else None


def _save_rows(path: Path, rows: Rows) -> None:
    tensors = {"images": rows.images, **rows.labels}
    try:
        save_tensors(path, tensors, kind="images", info={"sha256": _digest(rows), "names": rows.names})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"cannot keep decoded images in {path} ({error}); every run will decode them anew. "
            "Set SHALLOWDEEP_CACHE to a folder that can be written.",
            stacklevel=2,
        )


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256(json.dumps(rows.names).encode())
    for tensor in (rows.images, *rows.labels.values()):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _decode(shards: Sequence[Path], source: Source, title: str) -> Rows:
    """Read shards into one array; one thread, because two took longer (Pillow holds the lock)."""
    files = {shard: _open(shard, source) for shard in shards}
    total = sum(file.metadata.num_rows for file in files.values())
    console = Console(stderr=True)
    images = np.empty((0, 0, 0, 0), np.uint8)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        pixels = _pixels(files)
        for row, image in enumerate(progress.track(pixels, total, description=f"decoding {title}")):
            if row == 0:
                images = np.empty((total, *image.shape), np.uint8)
            elif image.shape != images.shape[1:]:
                raise DataError(
                    f"image {row} of {title} is {image.shape[1:]} pixels, the first {images.shape[2:]}. "
                    "Images of one data set have one size."
                )
            images[row] = image
    labels = {
        space: torch.cat([_labels(shard, file, column) for shard, file in files.items()])
        for space, column in source.columns.items()
    }
    names = {space: _class_names(shards[0], files[shards[0]], column) for space, column in source.columns.items()}
    return Rows(torch.from_numpy(images), labels, names)


def _open(shard: Path, source: Source) -> Any:
    parquet = require("pyarrow.parquet", extra="data")
    require("PIL.Image", extra="data")
    with _reading(shard):
        file = parquet.ParquetFile(shard)
    lacking = {"img", *source.columns.values()} - set(file.schema_arrow.names)
    if lacking:
        raise DataError(
            f"{shard} has no column {', '.join(sorted(lacking))}, only {', '.join(file.schema_arrow.names)}. "
            f"Take the files of {source.hub}."
        )
    return file


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    """Turn the reader's errors into ours."""
    arrow = require("pyarrow", extra="data")
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{shard} is truncated or no Parquet file ({error}). Copy or download it again.") from None


def _pixels(files: Mapping[Path, Any]) -> Iterator[np.ndarray]:
    """Decode one image after another, each of shape (3, height, width)."""
    image = require("PIL.Image", extra="data")
    for shard, file in files.items():
        for row, data in enumerate(_encoded(shard, file)):
            try:
                # the formats that occur: Pillow otherwise tries dozens, for as long as decoding takes
                picture = image.open(io.BytesIO(data or b""), formats=("PNG", "WEBP", "JPEG")).convert("RGB")
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(
                    f"{shard}, row {row}: cannot decode the image ({error}). Copy or download the file again."
                ) from None
            yield np.asarray(picture).transpose(2, 0, 1)


def _encoded(shard: Path, file: Any) -> Iterator[bytes | None]:
    with _reading(shard):
        for batch in file.iter_batches(1000, columns=["img"]):  # so many at a time: memory stays flat
            yield from batch.column("img").field("bytes").to_pylist()


def _labels(shard: Path, file: Any, column: str) -> Int[Tensor, " n"]:
    with _reading(shard):
        values = file.read([column]).column(column)
    if values.null_count:
        raise DataError(f"{shard} has {values.null_count} rows without {column}. Copy or download it again.")
    return torch.tensor(values.to_numpy(), dtype=torch.int64)


def _class_names(shard: Path, file: Any, column: str) -> tuple[str, ...]:
    try:
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{shard} does not name the classes of {column} in its 'huggingface' metadata. "
            "Write it with the datasets library, or download it again."
        ) from None
