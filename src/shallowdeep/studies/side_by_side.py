"""Running a study's cells: one after another in this process, or several side by side, each in its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from shallowdeep.errors import ConfigError, ShallowDeepError
from shallowdeep.studies.cells import Cell, Place, State, run_cell, state_of

POLL_S = 0.2
GRACE_S = 10.0  # between asking a process to end and ending it


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: its name.
        word: ``"done"``; ``"failed"``: it needs a hand; ``"left"``: another process is at it, or will be first.
        message: for ``"failed"`` and ``"left"``: why.
    """

    cell: str
    word: Literal["done", "failed", "left"]
    message: str = ""


def run_cells(
    cells: Sequence[Cell],
    place: Place,
    *,
    jobs: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run what is not done yet, a cell after the one it starts from; one that fails does not stop the others.

    Args:
        cells: any; one whose ``init`` is neither done nor among them is left blocked.
        place: where.
        jobs: cells side by side. One: in this process. More: each in a process of its own, which ends with this one
            where that is interrupted or asked to end; what they say goes to the cells' logs.
        progress: draw bars on the terminal, where there is one job.
        say: is told what begins and ends, a line at a time.

    Returns:
        An outcome per cell, in their order.

    Raises:
        ConfigError: there are no jobs.
    """
    if jobs < 1:
        raise ConfigError(f"at least one cell is run at a time, got --jobs {jobs}.")
    work = _Work(place, say, progress)
    waiting = list(cells)
    with _ending(work):
        while waiting or work.running:
            for cell in list(waiting):
                if len(work.running) == jobs:
                    break
                state = state_of(cell, place)
                if state.word == "blocked" and _comes_first(cell, waiting, work):
                    continue
                waiting.remove(cell)
                if state.word in ("begun", "missing"):
                    work.start(cell, state, here=jobs == 1)
                else:
                    work.end(cell, work.settled(cell, state))
            if work.running:
                work.wait()
    return [work.outcomes[cell.name] for cell in cells]


def _comes_first(cell: Cell, waiting: Sequence[Cell], work: _Work) -> bool:
    """Whether the cell that another starts from is yet to be run, or just running."""
    init = cell.init
    return init is not None and (init in waiting or init.name in work.running)


def _outcome(cell: Cell, state: State) -> Outcome:
    if state.word == "done":
        return Outcome(cell.name, "done")
    if state.word == "running":
        return Outcome(cell.name, "left", "another process is at it")
    return Outcome(cell.name, "failed", state.note)


@dataclass
class _Child:
    cell: Cell
    process: subprocess.Popen[bytes]
    started: float


@dataclass
class _Work:
    """The cells that run, and what became of those before them."""

    place: Place
    say: Callable[[str], None]
    progress: bool
    running: dict[str, _Child] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def start(self, cell: Cell, state: State, *, here: bool) -> None:
        """Run a cell here, or begin one in a process of its own."""
        self.say(f"{cell.name}: " + (f"goes on after epoch {state.epochs}" if state.epochs else "begins"))
        if here:
            started = time.monotonic()
            self.end(cell, _run_here(cell, self.place, self.progress), time.monotonic() - started)
            return
        log = self.place.log_of(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command_of(cell, self.place), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self.running[cell.name] = _Child(cell, process, time.monotonic())

    def settled(self, cell: Cell, state: State) -> Outcome:
        """What there is to say of a cell that is not to be run."""
        first = None if cell.init is None else self.outcomes.get(cell.init.name)
        if state.word == "blocked" and first is not None and first.word != "done":
            return Outcome(cell.name, first.word, f"it starts from {first.cell}, which is {first.word}")
        return _outcome(cell, state)

    def wait(self) -> None:
        """Until at least one process has ended."""
        while all(child.process.poll() is None for child in self.running.values()):
            time.sleep(POLL_S)
        for name, child in list(self.running.items()):
            if child.process.poll() is not None:
                del self.running[name]
                self.end(child.cell, _of_child(child, self.place), time.monotonic() - child.started)

    def end(self, cell: Cell, outcome: Outcome, seconds: float | None = None) -> None:
        """Note what became of a cell."""
        self.outcomes[cell.name] = outcome
        if outcome.word == "done" and seconds is not None:
            self.say(f"{cell.name}: done in {seconds / 60:.1f} minutes")
        elif outcome.word != "done":
            self.say(f"{cell.name}: {outcome.word}: {outcome.message}")


def command_of(cell: Cell, place: Place) -> list[str]:
    """The command line of a process that runs this cell alone, here."""
    words = [sys.executable, "-m", "shallowdeep", *cell.command, "--runs", str(place.runs)]
    words += ["--results", str(place.results), "--device", place.device]
    words += ["--compile"] if place.compile else []
    return words if place.data_dir is None else [*words, "--data-dir", place.data_dir]


def _run_here(cell: Cell, place: Place, progress: bool) -> Outcome:
    try:
        run_cell(cell, place, progress=progress)
    except (ShallowDeepError, OSError) as error:
        return Outcome(cell.name, "failed", str(error))
    except Exception as error:  # a bug, or a device out of memory: the other cells go on, and the log says all
        with place.log_of(cell).open("a") as file:
            traceback.print_exc(file=file)
        why = " ".join(str(error).split())[:200]
        return Outcome(cell.name, "failed", f"{type(error).__name__}: {why} (all of it: {place.log_of(cell)})")
    return Outcome(cell.name, "done")


def _of_child(child: _Child, place: Place) -> Outcome:
    cell, code = child.cell, child.process.returncode
    if code == 0:
        return _outcome(cell, state_of(cell, place))
    log = place.log_of(cell)
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    why = f"killed by signal {-code}, perhaps out of memory" if code < 0 else f"it ended with {code}"
    if said and code > 0:
        why = said[-1].removeprefix("error: ").removeprefix(f"{cell.name}: ")
    return Outcome(cell.name, "failed", f"{why} (all of it: {log})")


@contextmanager
def _ending(work: _Work) -> Iterator[None]:
    """Whatever ends this context, Ctrl-C and SIGTERM included, ends the processes that it began."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if main else None
    try:
        yield
    finally:
        for child in work.running.values():
            child.process.terminate()
        for child in work.running.values():
            try:
                child.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        if main:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
