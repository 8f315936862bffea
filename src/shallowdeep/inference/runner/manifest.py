"""What an exported folder says of itself, checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.inference.runner.sessions import RunnerError

FORMAT = 1  # of the exported folder; raised when an older runner could no longer understand it
MANIFEST = "manifest.json"
FORMS = ("stages", "single", "batched")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself.

    Raises:
        RunnerError: there is none, or it is of another kind or a later format, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunnerError(f"no file {path}. Name a folder that shallowdeep exported.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunnerError(f"cannot read {path} as JSON ({error}). Export anew.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "shallowdeep export":
        raise RunnerError(f"{path} is no manifest of a shallowdeep export.")
    version = manifest.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise RunnerError(
            f"{path} has format {_shown(version)}; this runner reads up to {FORMAT}. Use the folder's own run.py."
        )
    for problem in _MANIFEST(manifest, ""):
        raise RunnerError(f"{path}: {problem}. Export anew.")
    exits, costs, ends = manifest["exits"], manifest["costs"], [stage["exit"] for stage in manifest["stages"]]
    if ends != exits or len(costs) != len(ends):
        raise RunnerError(
            f"{path} contradicts itself: exits {exits}, stages that end at {ends}, {len(costs)} costs. Export anew."
        )
    return manifest


_Check = Callable[[Any, str], Iterator[str]]
"""A value of a manifest, and its name there, to what is wrong with it."""


def _is(what: str, holds: Callable[[Any], bool]) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not holds(value):
            yield f"{name} = {_shown(value)} is not {what}"

    return check


def _each(inner: _Check, *, least: int = 0) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, list) or len(value) < least:
            yield f"{name} = {_shown(value)} is not a list" + (f" of at least {least}" if least else "")
            return
        for place, one in enumerate(value):
            yield from inner(one, f"{name}[{place}]")

    return check


def _named(inner: _Check) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{name} = {_shown(value)} is not a mapping from names"
            return
        for key, one in value.items():
            yield from inner(one, f"{name}.{key}")

    return check


def _with(**parts: _Check) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{name} = {_shown(value)} is not a mapping with {', '.join(parts)}"
            return
        for key, inner in parts.items():
            if key in value:
                yield from inner(value[key], f"{name}.{key}" if name else key)
            else:
                yield f"{name or 'it'} does not say {key}"

    return check


def _or_none(inner: _Check) -> _Check:
    return lambda value, name: iter(()) if value is None else inner(value, name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _rises(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
    return whole and value[0] >= 0 and value == sorted(set(value))


def _is_dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and np.dtype(value).kind in "biuf"
    except (TypeError, ValueError, SyntaxError):  # numpy reads more into a text than names
        return False


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


_TEXT = _is("a text", lambda value: isinstance(value, str))
_NUMBERS = _named(_is("a finite number", _is_number))
_FILE = {
    "file": _is("the name of a file in the folder", lambda value: isinstance(value, str) and value == Path(value).name),
    "sha256": _TEXT,
}
_SIZE = _is("a whole number above 0", lambda value: type(value) is int and value > 0)
_MANIFEST = _with(
    exits=_is("a list of rising whole numbers", _rises),
    costs=_each(_is("a number above 0", lambda value: _is_number(value) and value > 0)),
    thresholds=_NUMBERS,
    extremes=_or_none(_with(early=_NUMBERS, late=_NUMBERS)),
    inputs=_each(
        _with(
            name=_TEXT,
            dtype=_is("a type of numbers", _is_dtype),
            shape=_each(_SIZE),
            range=_is("two finite numbers, the smaller first", _is_range),
        ),
        least=1,
    ),
    stages=_each(
        _with(
            **_FILE,
            exit=_is("a whole number", lambda value: type(value) is int),
            inputs=_each(_TEXT, least=1),
            outputs=_each(_TEXT, least=1),
        ),
        least=1,
    ),
    single=_or_none(_with(**_FILE)),
    batched=_or_none(_with(**_FILE)),
)


def checked_file(folder: Path, part: Mapping[str, Any]) -> Path:
    """A file of the folder, once its contents are known to be those the manifest speaks of."""
    path = folder / part["file"]
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunnerError(f"cannot read {path} ({why}). Export anew.") from None
    if found != part["sha256"]:
        raise RunnerError(
            f"{path} is not the file that {MANIFEST} speaks of (sha256 {found[:12]}…, there "
            f"{part['sha256'][:12]}…). Export anew."
        )
    return path
