"""A split's parquet shards become one array of pixels, decoded once and cached."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from torch import Tensor

from shallowdeep.errors import DataError, FileFormatError, require
from shallowdeep.progress import track
from shallowdeep.storage import load_tensors, save_tensors


class Rows(NamedTuple):
    """One split as its source has it; ``labels`` and ``names`` hold one entry for each label set."""

    images: UInt8[Tensor, "n c h w"]
    labels: dict[str, Int[Tensor, " n"]]
    names: dict[str, tuple[str, ...]]


def read_split(name: str, folder: Path, split: str, columns: Mapping[str, str]) -> Rows:
    """Take a split from the cache, or decode its shards and put it there.

    Args:
        name: of the data set.
        folder: holds the shards ``<split>-00000-of-0000N.parquet``, at any depth.
        split: ``"train"`` or ``"test"``.
        columns: label set -> its column in the files.

    Raises:
        DataError: shards are missing or damaged, or an image cannot be decoded.
        MissingExtra: a library that reads them is not installed.
    """
    shards = _find_shards(folder, split)
    cache = _cache_file(f"{name}-{split}", shards)
    rows = _load_rows(cache)
    if rows is None:
        rows = _decode(shards, columns, f"{name} {split}")
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


def _decode(shards: Sequence[Path], columns: Mapping[str, str], title: str) -> Rows:
    """Read shards into one array; one thread, because two took longer (Pillow holds the lock)."""
    files = {shard: _open(shard, columns) for shard in shards}
    total = sum(file.metadata.num_rows for file in files.values())
    images = np.empty((0, 0, 0, 0), np.uint8)
    for row, image in enumerate(track(_pixels(files), total, f"decode {title}")):
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
        for space, column in columns.items()
    }
    names = {space: _class_names(shards[0], files[shards[0]], column) for space, column in columns.items()}
    return Rows(torch.from_numpy(images), labels, names)


def _open(shard: Path, columns: Mapping[str, str]) -> Any:
    parquet = require("pyarrow.parquet", extra="data")
    require("PIL.Image", extra="data")
    with _reading(shard):
        file = parquet.ParquetFile(shard)
    lacking = {"img", *columns.values()} - set(file.schema_arrow.names)
    if lacking:
        raise DataError(
            f"{shard} has no column {', '.join(sorted(lacking))}, only {', '.join(file.schema_arrow.names)}. "
            "Take files with the columns of the Hugging Face hub's data set."
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
