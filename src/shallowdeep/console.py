"""What is shown on a terminal as a table, and what is typed there as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shallowdeep.errors import ConfigError


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table; columns are the keys of its first row."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, value in rows[0].items():
        # Where a terminal is too narrow, numbers go on in the next line: they are never cut short.
        table.add_column(name, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """Keys and values of ``--set``, the values as they were typed.

    Raises:
        ConfigError: one has no ``=``.

    >>> assignments(["recipe.lr=0.1"])
    {'recipe.lr': '0.1'}
    """
    pairs = [text.partition("=") for text in texts]
    for key, sign, _ in pairs:
        if not sign:
            raise ConfigError(f"--set takes key=value, got '{key}'.")
    return {key: value for key, _, value in pairs}


def options(texts: Sequence[str]) -> dict[str, Any]:
    """The same with values as a configuration reads them: numbers, true, lists, else text."""
    from shallowdeep.config import parse_value

    return {key: parse_value(value) for key, value in assignments(texts).items()}


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        ConfigError: they are none.

    >>> numbers("0,1,2")
    [0, 1, 2]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds takes numbers with commas between them, e.g. 0,1,2; got '{text}'.") from None


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Say that options are of no use here, rather than pass over them.

    Args:
        given: what each is, by the name it is typed with; ``None``: it was not given.
        why: the end of the sentence.

    Raises:
        ConfigError: one was given.

    >>> refuse({"--rounds": None}, "for a run folder")
    """
    used = [name for name, value in given.items() if value is not None]
    if used:
        raise ConfigError(f"{', '.join(used)} {'is' if len(used) == 1 else 'are'} {why}.")


def placements(sdn: Any) -> list[dict[str, Any]]:
    """A row per internal exit of a Shallow-Deep Network: where it was asked for, where it sits, its cost with exits."""
    return [
        {"exit": i, "tap": p.site.name, "asked": p.asked, "got": p.got, "cost with exits": cost}
        for i, (p, cost) in enumerate(zip(sdn.placements, sdn.costs.relative().tolist(), strict=False))
    ]
