"""A study's cells: trainings that resume, each ending in one small file of results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from shallowdeep.config import RunConfig
from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.runs.run import Run
from shallowdeep.storage import write_json
from shallowdeep.studies.measurement import measure
from shallowdeep.studies.results import CellResult, read_result
from shallowdeep.training.recipes import Trains

LOOK_S = 0.2
"""How long to look before a cell counts as running: others who only look hold its lock for an instant."""
PHASES: dict[str, tuple[Trains, ...]] = {
    "plain": ("backbone",),
    "ic_only": ("exits",),
    "distil": ("exits",),
    "joint": ("all",),
    "mixed": ("backbone", "all"),
}
"""Strategy of a run to what its phases train."""


@dataclass(frozen=True)
class Cell:
    """One training of a study, and what is measured after it.

    Attributes:
        name: unique in the study, with slashes; also the place of its run and of its result.
        strategy: as the study calls it, which may be another word than the run's own.
        config: of the run, without places: ``init``, ``data_dir``, ``device`` and ``compile`` are added where it is
            run.
        command: arguments of ``shallowdeep`` that run this cell alone, without places.
        init: the cell whose backbone it starts from.
    """

    name: str
    strategy: str
    config: RunConfig
    command: tuple[str, ...]
    init: Cell | None = None

    @property
    def epochs(self) -> int:
        """Of all its phases together."""
        config = self.config
        return sum(config.recipe.build(trains, config.network).epochs for trains in PHASES[config.strategy])


@dataclass(frozen=True)
class Place:
    """Where cells are run; nothing in it belongs to what a cell is.

    Attributes:
        runs: folder for run folders, logs and locks.
        results: folder for the small files.
        data_dir: folder with the data sets; ``None``: as ``load_data`` finds them.
        device: as for ``fit``.
        compile: as for ``fit``.
    """

    runs: Path
    results: Path
    data_dir: str | None = None
    device: str = "auto"
    compile: bool = False

    def run_of(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return self.runs / cell.name

    def result_of(self, cell: Cell) -> Path:
        """The cell's result."""
        return self.results / f"{cell.name}.json"

    def log_of(self, cell: Cell) -> Path:
        """What a process of its own, or an error, had to say."""
        return self.runs / f"{cell.name}.log"

    def lock_of(self, cell: Cell) -> Path:
        """Held while the cell is run; it stays there, empty, when it is not."""
        return self.runs / f"{cell.name}.lock"

    def config_of(self, cell: Cell) -> RunConfig:
        """The cell's configuration with the places of here."""
        init = None if cell.init is None else str(self.run_of(cell.init))
        places = {"data_dir": self.data_dir, "device": self.device, "compile": self.compile}
        return cell.config.model_copy(update={"init": init, **places})


Word = Literal["done", "running", "begun", "missing", "blocked", "damaged", "other"]


@dataclass(frozen=True)
class State:
    """How far a cell is.

    Attributes:
        word: ``"done"``: its result is there. ``"running"``: a process is at it. ``"begun"``: it resumes.
            ``"missing"``: nothing is there. ``"blocked"``: the cell it starts from is not done. ``"damaged"``: a file
            cannot be read. ``"other"``: what lies there is of another configuration. The last three need a hand.
        epochs: done.
        note: why, where the word does not say it.
    """

    word: Word
    epochs: int = 0
    note: str = ""


def state_of(cell: Cell, place: Place) -> State:
    """How far a cell is, from what lies there; no data and no weights are read."""
    if place.result_of(cell).exists():
        return _finished(cell, place)
    epochs = _epochs_done(place.run_of(cell))
    if _is_held(place.lock_of(cell)):
        return State("running", epochs)
    return _unfinished(cell, place, epochs)


def run_cell(cell: Cell, place: Place, *, progress: bool = True) -> CellResult:
    """Train a cell, or go on with it, record, measure and write its result; one that is done is only read.

    Killed at any moment, it loses the epoch it was in. The run's checkpoint is removed once the result is written.

    Raises:
        ConfigError: another process is at it, the cell it starts from is not done, or what lies there is of another
            configuration.
        FileFormatError: what lies there is damaged.
    """
    with _held(cell, place):
        state = _finished(cell, place) if place.result_of(cell).exists() else _unfinished(cell, place, 0)
        if state.word == "done":
            return read_result(place.result_of(cell))
        if state.word == "damaged":
            raise FileFormatError(state.note)
        if state.word not in ("begun", "missing"):
            raise ConfigError(state.note)
        run = Run(place.run_of(cell), place.config_of(cell))
        if place.compile:
            torch.compiler.reset()  # it remembers eight networks of one class, and runs a ninth one uncompiled
        sdn = run.fit(resume=True, progress=progress)
        traces = run.record(progress=progress)
        result = measure(
            run, sdn, traces, name=cell.name, strategy=cell.strategy, config=essence(cell), command=cell.command
        )
        write_json(place.result_of(cell), result.to_dict())
        (run.folder / "checkpoint.pt").unlink(missing_ok=True)
        return result


def essence(cell: Cell) -> RunConfig:
    """What decides the cell's figures: its configuration without places, starting from a cell by name."""
    return _without_places(cell.config, None if cell.init is None else cell.init.name)


def _without_places(config: RunConfig, init: str | None) -> RunConfig:
    features = config.features.model_copy(update={"folder": None})
    return config.model_copy(
        update={"init": init, "data_dir": None, "device": "auto", "compile": False, "features": features}
    )


def _finished(cell: Cell, place: Place) -> State:
    path = place.result_of(cell)
    try:
        found = read_result(path)
    except FileFormatError as error:
        return State("damaged", note=str(error))
    others = _differences(found.config, essence(cell))
    if found.name != cell.name:
        others = ["name", *others]
    if others:
        return State(
            "other",
            note=f"{path} is the result of another configuration ({', '.join(others)}). "
            "Ask for that one, or give another --results and --runs.",
        )
    return State("done", found.epochs)


def _unfinished(cell: Cell, place: Place, epochs: int) -> State:
    folder = place.run_of(cell)
    misfit = _misfit(cell, place, epochs)
    if misfit is not None:
        return misfit
    init = cell.init
    if init is not None and not (folder / "sdn.safetensors").exists() and not is_usable(init, place):
        why = f"{cell.name} starts from {init.name}, {_hint(init, place)}"
        return State("blocked", epochs, why)
    return State("begun" if _is_begun(folder) else "missing", epochs)


def _is_begun(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix != ".partial" for path in folder.iterdir())


def _misfit(cell: Cell, place: Place, epochs: int) -> State | None:
    """What is wrong with a run folder that is not of this cell; ``None``: it is, or there is none."""
    folder = place.run_of(cell)
    if not _is_begun(folder):
        return None
    try:
        config = Run.open(folder).config
    except FileFormatError as error:
        return State("damaged", epochs, f"{error} Remove {folder} to begin anew.")
    others = _differences(_without_places(config, _last_parts(config.init, cell)), essence(cell))
    if not others:
        return None
    return State(
        "other",
        epochs,
        f"{folder} holds a run of another configuration ({', '.join(others)}). "
        "Ask for that one, or give another --runs.",
    )


def _hint(init: Cell, place: Place) -> str:
    """Why others cannot start from a cell, and what to do."""
    if place.result_of(init).exists():
        for state in (_finished(init, place), _misfit(init, place, 0)):
            if state is not None and state.word != "done":
                return f"which is no use here: {state.note}"
        return f"which has a result and no weights in {place.runs}. Give another --results to train it again there."
    return f"which is not done. Run that first: shallowdeep {' '.join(init.command)}"


def is_usable(cell: Cell, place: Place) -> bool:
    """Whether another cell can start from this one: its result and its weights are here, both of its configuration."""
    if not place.result_of(cell).exists() or not (place.run_of(cell) / "sdn.safetensors").exists():
        return False
    return _finished(cell, place).word == "done" and _misfit(cell, place, 0) is None


def _last_parts(init: str | None, cell: Cell) -> str | None:
    """A path of a run as the name of its cell."""
    if init is None or cell.init is None:
        return init
    return "/".join(Path(init).parts[-cell.init.name.count("/") - 1 :])


def _differences(found: RunConfig, asked: RunConfig) -> list[str]:
    return [key for key in RunConfig.model_fields if getattr(found, key) != getattr(asked, key)]


def _epochs_done(folder: Path) -> int:
    path = folder / "history.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@contextmanager
def _held(cell: Cell, place: Place) -> Iterator[None]:
    path = place.lock_of(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2.0)  # whoever only looks lets go at once
    except Timeout:
        raise ConfigError(f"{cell.name} is being run by another process, which holds {path}.") from None
    try:
        yield
    finally:
        lock.release()


def _is_held(path: Path) -> bool:
    if not path.exists() or not os.access(path, os.W_OK):
        return False
    try:
        with FileLock(path).acquire(timeout=LOOK_S, poll_interval=LOOK_S / 10):
            return False
    except Timeout:
        return True
