"""A part of the page that could not be made, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shallowdeep.errors import ShallowDeepError

T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """Stands where a part should be; the page shows the reason there.

    Attributes:
        reason: one sentence, with what to do about it.
    """

    reason: str


def attempt(make: Callable[[], T]) -> T | Missing:
    """Make a part, or say why it cannot be made.

    >>> from shallowdeep.errors import TraceError
    >>> def fail():
    ...     raise TraceError("there are no labels.")
    >>> attempt(fail)
    Missing(reason='there are no labels.')
    """
    try:
        return make()
    except (ShallowDeepError, OSError) as error:
        return Missing(str(error))
