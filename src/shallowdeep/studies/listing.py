"""A study's cells as rows of a list: how far each is, what it still costs, and the results that lie beside them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shallowdeep.errors import FileFormatError
from shallowdeep.studies.cells import Cell, Place, State, state_of
from shallowdeep.studies.estimates import Rates, measure_rates, training_flops
from shallowdeep.studies.results import read_result
from shallowdeep.studies.selection import is_asked


def list_cells(cells: Sequence[Cell], place: Place) -> list[dict[str, Any]]:
    """A row per cell: its state, the epochs done, what training it still costs and why it waits.

    The cost is for complete data; hours rest on trainings that lie in the place, and are ``None`` before any. An ``≈``
    stands before those that rest on other networks' trainings.
    """
    rates = measure_rates(place)
    return [_listed(cell, state_of(cell, place), rates, place) for cell in cells]


def list_besides(cells: Sequence[Cell], place: Place, patterns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows, as of ``list_cells``, for results of the same networks and data that are not among the cells.

    They are of another length, seed or recipe, and count where a page is written. The note has the options that ask
    for them.

    Args:
        cells: that are listed already.
        place: where results lie.
        patterns: of ``select``; without them all.
    """
    names, folders = {cell.name for cell in cells}, sorted({cell.name.rpartition("/")[0] for cell in cells})
    rows = []
    for path in (path for folder in folders for path in sorted((place.results / folder).glob("*.json"))):
        name = path.relative_to(place.results).with_suffix("").as_posix()
        if name not in names and is_asked(name, patterns):
            rows.append(_beside(name, path))
    return rows


def _beside(name: str, path: Path) -> dict[str, Any]:
    try:
        found = read_result(path)
    except FileFormatError as error:
        return _row(name, "damaged", note=str(error))
    words = shlex.split(found.provenance.command)
    asked = words[words.index(name) + 1 :] if name in words else words
    return _row(name, "done", f"{found.epochs}/{found.epochs}", 0.0, "0.00", f"asked for by {shlex.join(asked)}")


def _listed(cell: Cell, state: State, rates: Rates, place: Place) -> dict[str, Any]:
    flops, rate = training_flops(cell), rates.of(cell)
    done = 1.0 if state.word == "done" else min(state.epochs / cell.epochs, 1.0)
    left = None if flops is None else flops * (1 - done)
    about = "" if rates.know(cell.config.network) else "≈ "
    hours = "0.00" if left == 0 else None if left is None or rate is None else f"{about}{left / rate / 3600:.2f}"
    return _row(cell.name, state.word, f"{state.epochs}/{cell.epochs}", left, hours, _note(cell, state, place))


def _note(cell: Cell, state: State, place: Place) -> str:
    """Why a cell waits; one that waits for a cell that is yet to end needs few words."""
    if state.word != "blocked" or cell.init is None or place.result_of(cell.init).exists():
        return state.note
    return f"after {cell.init.name.rpartition('/')[2]}"


def _row(
    cell: str, state: str, epochs: str = "", flops: float | None = None, hours: str | None = None, note: str = ""
) -> dict[str, Any]:
    return {
        "cell": cell,
        "state": state,
        "epochs": epochs,
        "PFLOP left": None if flops is None else f"{flops / 1e15:.3g}",
        "hours left": hours,
        "note": note,
    }
