"""Progress bars on the terminal, and silence where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


class Bar:
    """One line of a progress display; ``advance`` moves it, ``say`` sets the words behind it."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress = progress
        self._task = task

    def advance(self, steps: int = 1) -> None:
        """Move on by some steps."""
        self._progress.advance(self._task, steps)

    def say(self, text: str) -> None:
        """Show a few words behind the bar."""
        self._progress.update(self._task, text=text)


@contextmanager
def bar(title: str, total: int | None, *, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A progress bar on standard error with time spent and time left; nothing where that is no terminal.

    A total of ``None`` is one that nobody knows.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done, text=""))


def track(items: Iterable[T], total: int | None, title: str, *, shown: bool = True) -> Iterator[T]:
    """Pass items on, moving a progress bar at each."""
    with bar(title, total, shown=shown) as line:
        for item in items:
            yield item
            line.advance()
