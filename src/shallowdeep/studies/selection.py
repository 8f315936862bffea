"""Cells by name: from patterns to the cells they choose, and back to few patterns."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from shallowdeep.errors import ConfigError
from shallowdeep.studies.cells import Cell


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose name fits one of the patterns, in their order; without patterns all.

    Args:
        cells: to choose from.
        patterns: names, in which ``*`` and ``?`` stand for anything.

    Raises:
        ConfigError: no cell fits a pattern; the nearest names are given.
    """
    names = [cell.name for cell in cells]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.5)
            hint = f" Near it: {', '.join(near)}." if near else ""
            raise ConfigError(f"no cell fits '{pattern}'.{hint} --list shows all names.")
    return [cell for cell in cells if is_asked(cell.name, patterns)]


def is_asked(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns; without patterns every name does.

    >>> is_asked("digits/vgg16/plain", ["*/joint", "digits/*"]), is_asked("digits", ["cifar*"]), is_asked("digits", [])
    (True, False, True)
    """
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def patterns_of(names: Sequence[str], offered: Sequence[str]) -> list[str]:
    """Few patterns that select these names and no other ones of those offered: whole data sets, networks, strategies.

    >>> offered = ["digits/vgg16/plain-fast-seed0", "digits/vgg16/joint-fast-seed0", "digits/resnet20/plain-fast-seed0"]
    >>> patterns_of(offered[:2], offered), patterns_of(offered, offered), patterns_of(["elsewhere"], offered)
    (['digits/vgg16/*'], ['digits/*'], ['elsewhere'])
    """
    patterns: list[str] = []
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        folders, _, cell = name.rpartition("/")
        wide = (f"{folders.partition('/')[0]}/*", f"{folders}/*", f"{folders}/{cell.partition('-')[0]}-*")
        fits = (pattern for pattern in wide if {*names} >= {*fnmatch.filter(offered, pattern)} != set())
        patterns.append(next(fits, name))
    return patterns
