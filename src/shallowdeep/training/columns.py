"""Columns of numbers on disk: appended batch after batch, and then mapped into memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.storage import read_as, read_json, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Column:
    """One file: numbers of one type, rows first."""

    dtype: Literal["float32", "float16", "int64"]
    shape: tuple[int, ...]  # of a row

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return getattr(torch, self.dtype).itemsize * math.prod(self.shape)

    def open(self, path: Path, rows: int) -> Tensor:
        """The file's numbers, read as they are asked for."""
        if path.stat().st_size != rows * self.row_bytes:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {rows * self.row_bytes}")
        numbers = rows * math.prod(self.shape)
        return torch.from_file(str(path), size=numbers, dtype=getattr(torch, self.dtype)).view(rows, *self.shape)


def write_columns(
    folder: Path,
    batches: Iterable[Mapping[str, Tensor | None]],
    *,
    kept_in: torch.dtype,
    num_rows: int | None,
    about: Mapping[str, Any],
) -> None:
    """Write one file per column, batch after batch, and last of all what they are.

    Args:
        folder: to write into.
        batches: column to rows; a column is there in all batches or in none, and ``None`` is none.
        kept_in: type of floating-point numbers; all others become int64.
        num_rows: of all batches together, where it is known: too little room is then noticed at the beginning.
        about: kept beside the columns, JSON-able.

    Raises:
        ConfigError: there is not enough room, or a number is not finite in that type.
    """
    columns: dict[str, Column] = {}
    rows = 0
    with ExitStack() as files:
        opened: dict[str, Any] = {}
        for batch in batches:
            kept = {name: _kept(name, tensor, kept_in) for name, tensor in batch.items() if tensor is not None}
            if not opened:
                columns = {name: _column(tensor) for name, tensor in kept.items()}
                _check_room(folder, columns, num_rows)
                opened = {name: files.enter_context((folder / f"{name}.bin").open("wb")) for name in columns}
            for name, tensor in kept.items():
                _append(opened[name], tensor)
            rows += len(next(iter(kept.values())))
    described = {name: {"dtype": column.dtype, "shape": column.shape} for name, column in columns.items()}
    write_json(folder / MANIFEST, {"about": dict(about), "rows": rows, "columns": described})


def read_columns(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Columns as tensors that are mapped into memory, and what was kept beside them.

    Raises:
        FileFormatError: they are damaged.
    """
    values = read_json(folder / MANIFEST)
    try:
        columns, rows = read_as(dict[str, Column], values["columns"]), read_as(int, values["rows"])
        about = read_as(dict[str, Any], values["about"])
        return {name: column.open(folder / f"{name}.bin", rows) for name, column in columns.items()}, about
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise FileFormatError(f"{folder} is damaged ({error}). Remove it, and it is recorded anew.") from None


def _kept(name: str, tensor: Tensor, kept_in: torch.dtype) -> Tensor:
    real = tensor.is_floating_point()
    kept = tensor.cpu().to(kept_in if real else torch.int64).contiguous()
    if real and not kept.isfinite().all():
        raise ConfigError(
            f"features of {name} are not finite in {kept.dtype}. Keep them in fp32, or look at the network."
        )
    return kept


def _column(tensor: Tensor) -> Column:
    dtype: Any = str(tensor.dtype).removeprefix("torch.")
    return Column(dtype, tuple(tensor.shape[1:]))


def _check_room(folder: Path, columns: Mapping[str, Column], num_rows: int | None) -> None:
    needed = (num_rows or 0) * sum(column.row_bytes for column in columns.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder.parent} has {free / 1e9:.1f} GB left, and a pass needs {needed / 1e9:.1f}. Name another place "
            "(features.folder), take fewer passes, or features.dtype=fp16."
        )


def _append(file: Any, tensor: Tensor) -> None:
    try:
        file.write(tensor.numpy().data)
    except OSError as error:
        error.filename = file.name
        raise
