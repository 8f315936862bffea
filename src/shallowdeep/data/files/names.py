"""Which split a file or folder is, by what it is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def split_called(name: str, words: Mapping[str, Sequence[str]]) -> str | None:
    """The split whose word a name begins with, else the last one that stands in it by itself; in any case.

    Args:
        name: of a file, without its suffix, or of a folder.
        words: split -> what it may be called, in lower case.

    >>> words = {"train": ("train", "training"), "test": ("test",)}
    >>> [split_called(name, words) for name in ("Train-00000-of-00002", "seg_test", "latest")]
    ['train', 'test', None]
    """
    parts = [part for part in re.split(r"[-_.\s\d]+", name.lower()) if part]
    found = [split for part in (*parts[:1], *reversed(parts)) for split, known in words.items() if part in known]
    return found[0] if found else None
