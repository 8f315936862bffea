"""Files that are whole or not there: written beside their place and renamed, read without unpickling."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shallowdeep.errors import FileFormatError

FORMAT = 1  # raised when a reader of the previous format could no longer understand the file


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give out a path beside ``path``; on success rename it there, on any error remove it.

    A reader therefore never sees half a file, and a full disk leaves the previous file as it was.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as partial:
    ...     _ = partial.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        FileFormatError: it is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"no file {path}. Name the path of one that is there.") from None
    except (ValueError, OSError) as error:
        raise FileFormatError(f"cannot read {path} as JSON: {error}") from None


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, kind: str, info: Mapping[str, Any]
) -> None:
    """Write named tensors and a JSON-able description as one safetensors file.

    Args:
        path: where to; replaced when it exists.
        tensors: any shapes and types, on any device; views and shared memory are written out.
        kind: what the file is, e.g. ``"trace"``; ``load_tensors`` asks for the same word.
        info: read back by ``load_tensors``.
    """
    flat = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    metadata = {"shallowdeep": json.dumps({"kind": kind, "format": FORMAT, "info": dict(info)})}
    with replacing(path) as partial:
        try:
            save_file(flat, partial, metadata=metadata)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"cannot write {path}: {error}") from error


def load_tensors(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what ``save_tensors`` wrote.

    Raises:
        FileFormatError: the file is missing, truncated, no safetensors file, not written by this
            package, of another kind or of a later format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("shallowdeep", "{}"))
            if not isinstance(header, dict) or not header.keys() >= {"kind", "format", "info"}:
                raise FileFormatError(f"{path} is a file that shallowdeep did not write, not a {kind}.")
            _check_header(header, path, kind)
            return {name: file.get_tensor(name) for name in file.keys()}, header["info"]  # noqa: SIM118
    except FileNotFoundError:
        raise FileFormatError(f"no file {path}. Name the path of one that is there.") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise FileFormatError(f"{path} is truncated or no safetensors file ({error}). Write it anew.") from None


def _check_header(header: Mapping[str, Any], path: object, kind: str) -> None:
    if header["kind"] != kind:
        raise FileFormatError(f"{path} is a {header['kind']}, not a {kind}.")
    if header["format"] > FORMAT:
        raise FileFormatError(
            f"{path} has format {header['format']}; this version reads up to {FORMAT}. Upgrade shallowdeep."
        )
