"""What is made once from a data set's files and kept: decoded pixels, and images packed to be mapped."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Int, UInt8
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from torch import Tensor

from shallowdeep.errors import FileFormatError
from shallowdeep.storage import load_tensors, save_tensors


class Rows(NamedTuple):
    """One split as its source has it; ``labels`` and ``names`` hold one entry for each label set."""

    images: UInt8[Tensor, "n c h w"]
    labels: dict[str, Int[Tensor, " n"]]
    names: dict[str, tuple[str, ...]]


def cache_folder() -> Path:
    """SHALLOWDEEP_CACHE, or a folder of the user's."""
    return Path(os.environ.get("SHALLOWDEEP_CACHE") or user_cache_dir("shallowdeep"))


def kept_rows(stem: str, key: str, make: Callable[[], Rows]) -> Rows:
    """Rows out of the cache, or made and put there.

    Args:
        stem: of the file's name.
        key: another one where the sources are others.
        make: decodes them.
    """
    path = cache_folder() / f"{stem}-{key}.safetensors"
    rows = _load_rows(path)
    if rows is None:
        rows = make()
        _save_rows(path, rows)
    return rows


def content_key(files: Sequence[Path]) -> str:
    """Changes with any byte of the files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def change_key(files: Sequence[Path], *words: str) -> str:
    """Changes with the words, and with the name, size or time of a file: to read them all would take minutes."""
    notes = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return word_key(json.dumps(notes), *words)


def word_key(*words: str) -> str:
    """Changes with any of the words; fit for a file's name."""
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


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
