"""Parquet shards of images: which files are which split, which columns are images and labels."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.files.cache import Rows, content_key, kept_rows
from shallowdeep.data.files.decode import decode
from shallowdeep.data.files.names import split_called
from shallowdeep.data.files.stores import ParquetStore, Part, check_rows, reading
from shallowdeep.errors import DataError, require
from shallowdeep.progress import track

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


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
    shards = find_shards(folder, split)
    key = content_key(shards)
    return kept_rows(f"{name}-{split}", key, lambda: decode_part(read_part(shards, columns), f"{name} {split}"))


def find_shards(folder: Path, split: str) -> list[Path]:
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


def sort_shards(folder: Path, words: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    """Which Parquet files are which split, in whatever way they are named.

    A file belongs to a split when it is called so, as ``split_called`` reads names, else when its folder is. Where
    none is, all are the training split; where some are, the others are left out with a warning.

    Args:
        folder: searched at any depth; or one file.
        words: split -> what it may be called.

    Returns:
        Split -> its shards in order, for the splits that are there.

    Raises:
        DataError: there are none, or none to train on, or a split lies in several folders, as several data sets would.
    """
    if folder.is_file():
        return {"train": [folder]}
    files = sorted(folder.rglob("*.parquet"))
    splits = {split: [path for path in files if _split_of(path, folder, words) == split] for split in words}
    nameless = [str(path.relative_to(folder)) for path in files if not any(path in found for found in splits.values())]
    if len(nameless) == len(files):
        splits["train"] = files
    elif nameless:
        warnings.warn(
            f"{folder}: {', '.join(nameless[:3])}{'…' if nameless[3:] else ''} are called like none of "
            f"{', '.join(splits)} and are not read.",
            stacklevel=2,
        )
    if not splits["train"]:
        raise DataError(f"no Parquet files to train on under {folder}. Call them train-00000-of-0000N.parquet.")
    for split, found in splits.items():
        places = sorted({str(path.parent) for path in found})
        if len(places) > 1:
            raise DataError(f"{split} lies in several folders: {', '.join(places)}. Name the one to read.")
        _warn_of_missing(found, split)
    return {split: found for split, found in splits.items() if found}


def _split_of(path: Path, folder: Path, words: Mapping[str, Sequence[str]]) -> str | None:
    return split_called(path.stem, words) or split_called(path.parent.relative_to(folder).name, words)


def _warn_of_missing(shards: Sequence[Path], split: str) -> None:
    counts = {int(match[2]) for path in shards if (match := _SHARD.search(path.stem))}
    if counts and len(shards) < max(counts):
        warnings.warn(
            f"{shards[0].parent} has {len(shards)} of {max(counts)} shards of {split}: a part of the data set, "
            "whose figures do not compare with others'. Copy or download the rest.",
            stacklevel=2,
        )


def label_columns(shard: Path, column: str | None) -> dict[str, str]:
    """Which column holds which label set: one that is named or called as labels are, and a coarse one beside it.

    Raises:
        DataError: the file is damaged, or has no such column.
    """
    known = _open(shard, {}).schema_arrow.names
    found = [name for name in ((column,) if column else LABEL_COLUMNS) if name in known]
    if not found:
        raise _no_column(shard, f"column {column}" if column else f"label column ({', '.join(LABEL_COLUMNS)})", known)
    columns = {"fine": found[0]}
    return columns | {"coarse": "coarse_label"} if found[0] == "fine_label" and "coarse_label" in known else columns


def read_part(
    shards: Sequence[Path],
    columns: Mapping[str, str],
    *,
    image_column: str | None = None,
    names: Mapping[str, tuple[str, ...]] | None = None,
    any_labels: bool = False,
) -> Part:
    """Labels of all rows, and where their images are.

    Args:
        shards: in order.
        columns: label set -> its column.
        image_column: where the images are; ``None``: the first that is called as images are.
        names: classes of the label sets, as another split has them.
        any_labels: whether, where the metadata names no classes, the distinct values are the classes.

    Raises:
        DataError: a shard is damaged, a column is missing, a row has no label or one that is no class.
    """
    files = {shard: _open(shard, columns) for shard in shards}
    images = _image_column(shards[0], files[shards[0]], image_column)
    labels, classes = {}, {}
    for space, column in columns.items():
        given = None if names is None else names[space]
        labels[space], classes[space] = _read_labels(files, column, given, any_labels)
    counts = tuple(file.metadata.num_rows for file in files.values())
    return Part(ParquetStore(tuple(shards), counts, images), labels, classes)


def read_texts(
    shards: Sequence[Path], text_column: str, columns: Mapping[str, str]
) -> tuple[list[str], dict[str, Int[Tensor, " n"]], dict[str, tuple[str, ...]]]:
    """Texts of all rows, with the labels and class names of each label set.

    Args:
        shards: in order.
        text_column: where the texts are.
        columns: label set -> its column, with class names in the 'huggingface' metadata.

    Raises:
        DataError: a shard is damaged, a column is missing, or a row has no text or no label.
    """
    files = {shard: _open(shard, {**columns, "": text_column}) for shard in shards}
    texts = [text for shard, file in files.items() for text in _values(shard, file, text_column)]
    found = {space: _read_labels(files, column, None, False) for space, column in columns.items()}
    return (
        [str(text) for text in texts],
        {space: labels for space, (labels, _) in found.items()},
        {space: names for space, (_, names) in found.items()},
    )


def decode_part(part: Part, title: str) -> Rows:
    """Read all images into one array; one thread, because two took longer (Pillow holds the lock).

    Raises:
        DataError: an image cannot be decoded, or has another size than the first.
    """
    images, total = np.empty((0, 0, 0, 0), np.uint8), len(part.store)
    for row, content in enumerate(track(part.store.contents(), total, f"decode {title}")):
        image = np.asarray(decode(content, part.store.where(row))).transpose(2, 0, 1)
        if row == 0:
            images = np.empty((total, *image.shape), np.uint8)
        elif image.shape != images.shape[1:]:
            raise DataError(
                f"image {row} of {title} is {image.shape[1:]} pixels, the first {images.shape[2:]}. "
                "Images of one data set have one size; to make it so, give a preprocessing."
            )
        images[row] = image
    return Rows(torch.from_numpy(images), part.labels, part.names)


def _open(shard: Path, columns: Mapping[str, str]) -> Any:
    parquet = require("pyarrow.parquet", extra="data")
    with reading(shard):
        file = parquet.ParquetFile(shard)
        known = file.schema_arrow.names
    lacking = sorted(set(columns.values()) - set(known))
    if lacking:
        raise _no_column(shard, f"column {', '.join(lacking)}", known)
    return file


def _image_column(shard: Path, file: Any, column: str | None) -> str:
    known = file.schema_arrow.names
    found = [name for name in ((column,) if column else IMAGE_COLUMNS) if name in known]
    if not found:
        raise _no_column(shard, f"column {column}" if column else f"image column ({', '.join(IMAGE_COLUMNS)})", known)
    return found[0]


def _no_column(shard: Path, what: str, known: Sequence[str]) -> DataError:
    return DataError(
        f"{shard} has no {what}, only {', '.join(known)}. Take files with the columns of the Hugging Face hub's data "
        "set, or name them: image_column=, label_column=."
    )


def _values(shard: Path, file: Any, column: str) -> list[Any]:
    types = require("pyarrow", extra="data").types
    with reading(shard):
        values = file.read([column]).column(column)
        found = values.to_pylist()
    check_rows(shard, column, len(found), file.metadata.num_rows)
    if values.null_count:
        raise DataError(f"{shard} has {values.null_count} rows without {column}. Copy or download it again.")
    if not any(kind(values.type) for kind in (types.is_integer, types.is_string, types.is_large_string)):
        raise DataError(f"{shard}: column {column} is {values.type}, no labels. Name theirs with label_column=.")
    return found


def _class_names(file: Any, column: str) -> tuple[str, ...] | None:
    try:
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _read_labels(
    files: Mapping[Path, Any], column: str, given: tuple[str, ...] | None, any_labels: bool
) -> tuple[Int[Tensor, " n"], tuple[str, ...]]:
    """Labels as numbers, and the classes' names: ``given`` by another split, declared in the file, or its values."""
    first, file = next(iter(files.items()))
    declared, where = _class_names(file, column), f"{first}, column {column}"
    if declared is None and not any_labels:
        raise DataError(
            f"{first} does not name the classes of {column} in its 'huggingface' metadata. "
            "Write it with the datasets library, or download it again."
        )
    if given and declared and given != declared:
        raise DataError(f"{where}: classes are called {declared[:3]}…, in the training split {given[:3]}….")
    values = [value for shard, other in files.items() for value in _values(shard, other, column)]
    if declared and all(isinstance(value, int) and abs(value) < 2**63 for value in values):
        return torch.tensor(values, dtype=torch.int64), declared
    names = given or declared or tuple(str(value) for value in sorted(set(values)))
    return _numbered(values, names, where), names


def _numbered(values: Sequence[Any], names: tuple[str, ...], where: str) -> Int[Tensor, " n"]:
    number = {name: label for label, name in enumerate(names)}
    foreign = [value for value in values if str(value) not in number]
    if foreign:
        raise DataError(
            f"{where}: '{foreign[0]}' is none of the {len(names)} classes {names[:3]}…. Mend the labels, or the names."
        )
    return torch.tensor([number[str(value)] for value in values], dtype=torch.int64)
