"""Files that are whole or not there: written beside their place and renamed, read without unpickling."""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
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
    except OSError as error:
        if error.errno and not error.filename:  # a write that fails names no file by itself
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def making(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give out a new folder beside ``folder``; on success rename it there, on any error remove it.

    Args:
        folder: not there yet, or empty.
    """
    folder = Path(folder).absolute()
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)  # by a killed process
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half-written in a run folder, and nowhere deeper."""
    for place in (Path(folder), Path(folder) / "traces", Path(folder) / "results"):
        for partial in place.glob(".*.partial"):
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
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"no file {path}. Name the path of one that is there.") from None
    except (ValueError, OSError) as error:
        raise FileFormatError(f"cannot read {path} as JSON: {error}") from None


def parse_json(text: str) -> Any:
    """JSON whose numbers are all finite.

    Raises:
        ValueError: it is none.

    >>> parse_json('{"cost": [0.5, 1]}')
    {'cost': [0.5, 1]}
    """
    try:
        return json.loads(
            text,
            parse_int=lambda digits: _finite(int(digits)),
            parse_float=lambda digits: _finite(float(digits)),
            parse_constant=lambda word: _finite(float(word)),
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(number: int | float) -> int | float:
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"it holds {shown(number)}, no finite number")
    return number


def read_as(kind: Any, values: Any) -> Any:
    """A dataclass, or a container of them, from what a file says of it, every field of its own type.

    Raises:
        TypeError: a field is missing, has another type, or does not fit the others.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise TypeError(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """The first value that is not as it should be, and why, in one line."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{shown(name)[1:-1]} = {shown(problem['input'])}: {problem['msg'].lower().rstrip('.')}"


def shown(value: object) -> str:
    """A value from outside as a message may hold it: in one line, and not too long.

    >>> shown("a word")
    "'a word'"
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, or too deep
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:40]}…{text[-39:]}"


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
            header = parse_json((file.metadata() or {}).get("shallowdeep", "{}"))
            _check_header(header, path, kind)
            return {name: file.get_tensor(name) for name in file.keys()}, header["info"]  # noqa: SIM118
    except FileNotFoundError:
        raise FileFormatError(f"no file {path}. Name the path of one that is there.") from None
    except FileFormatError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise FileFormatError(f"{path} is truncated or no safetensors file ({why}). Write it anew.") from None


def _check_header(header: Any, path: object, kind: str) -> None:
    types = {"kind": str, "format": int, "info": dict}
    if not isinstance(header, dict) or any(type(header.get(key)) is not wanted for key, wanted in types.items()):
        raise FileFormatError(f"{path} is a file that shallowdeep did not write, not a {kind}.")
    if header["kind"] != kind:
        raise FileFormatError(f"{path} is a {shown(header['kind'])[1:-1]}, not a {kind}.")
    if not 1 <= header["format"] <= FORMAT:
        raise FileFormatError(
            f"{path} has format {shown(header['format'])}; this version reads up to {FORMAT}. Upgrade shallowdeep."
        )


def misfits(own: Mapping[Any, Any], found: Mapping[Any, Any]) -> list[str]:
    """Names under which a file's state dict does not fit a module's: missing, unknown, of another shape or type."""
    return sorted(
        str(name)
        for name in own.keys() | found.keys()
        if name not in own or name not in found or not _alike(own[name], found[name])
    )


def _alike(own: Any, found: Any) -> bool:
    """Whether a value fits in the place of another; a state dict may hold more than tensors."""
    if not isinstance(own, Tensor) or not isinstance(found, Tensor):
        return isinstance(own, Tensor) == isinstance(found, Tensor)
    kinds = [(tensor.is_floating_point(), tensor.is_complex(), tensor.layout) for tensor in (own, found)]
    return own.shape == found.shape and kinds[0] == kinds[1] and not found.is_meta
