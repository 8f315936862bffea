"""Cells side by side, each in a process of its own, say what cells alone say; one that fails stops no other."""

import os
import sys
import time
from pathlib import Path

import pytest
from studies.test_cells import figures
from torch import nn

from shallowdeep.errors import ConfigError
from shallowdeep.networks.zoo import NETWORKS
from shallowdeep.studies import side_by_side
from shallowdeep.studies.cells import Place, state_of
from shallowdeep.studies.paper.matrix import Matrix
from shallowdeep.studies.results import read_result
from shallowdeep.studies.side_by_side import run_cells

TESTS = Path(__file__).parents[1]
CHILD = """
import sys
from pathlib import Path
from studies.conftest import small_cells
from shallowdeep.studies.cells import Place, run_cell

name, runs, results = sys.argv[1:]
if "joint" in name and "trouble" in runs:
    sys.exit("error: " + name + ": no images here")
[cell] = [cell for cell in small_cells() if cell.name == name]
run_cell(cell, Place(Path(runs), Path(results), device="cpu"), progress=False)
"""


@pytest.fixture
def children(monkeypatch):
    """Processes that run the small cells, which no command line can name."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(
        side_by_side,
        "command_of",
        lambda cell, place: [sys.executable, "-c", CHILD, cell.name, str(place.runs), str(place.results)],
    )


def test_a_cell_waits_for_the_one_it_starts_from(cells, finished, place, monkeypatch):
    """Side by side, with processes that put what was done elsewhere into this place."""

    def copied(cell, place):
        place.result_of(cell).parent.mkdir(parents=True, exist_ok=True)
        old_and_new = [getattr(where, kind)(cell) for kind in ("run_of", "result_of") for where in (finished, place)]
        return [
            sys.executable,
            "-c",
            "import shutil, sys; shutil.copytree(*sys.argv[1:3]); shutil.copy(*sys.argv[3:])",
            *map(str, old_and_new),
        ]

    monkeypatch.setattr(side_by_side, "command_of", copied)
    said = []
    outcomes = run_cells(cells[:3], place, jobs=2, say=said.append)
    assert [outcome.word for outcome in outcomes] == ["done"] * 3, outcomes
    plain, ic_only, joint = (cell.name for cell in cells[:3])
    assert said[:2] == [f"{plain}: begins", f"{joint}: begins"]
    assert said.index(f"{ic_only}: begins") > [line.startswith(f"{plain}: done") for line in said].index(True)


def test_a_failing_process_stops_no_other(children, cells, tmp_path):
    place = Place(tmp_path / "trouble", tmp_path / "results", device="cpu")
    plain, joint = cells[0], cells[2]
    outcomes = run_cells([joint, plain], place, jobs=2, say=lambda line: None)
    assert [outcome.word for outcome in outcomes] == ["failed", "done"]
    assert outcomes[0].message == f"no images here (all of it: {place.log_of(joint)})"
    assert state_of(plain, place).word == "done"


def test_what_starts_from_a_failed_cell_is_not_run(children, cells, place, monkeypatch):
    monkeypatch.setattr(side_by_side, "command_of", lambda cell, place: [sys.executable, "-c", "import os; os.abort()"])
    outcomes = run_cells(cells[:2], place, jobs=2, say=lambda line: None)
    assert [outcome.word for outcome in outcomes] == ["failed", "failed"]
    assert "killed by signal 6" in outcomes[0].message
    assert outcomes[1].message == f"it starts from {cells[0].name}, which is failed"


def test_interrupted_it_ends_its_processes(cells, place, monkeypatch):
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(side_by_side, "command_of", lambda cell, place: asleep)
    begun, popen = [], side_by_side.subprocess.Popen

    def spawn(*args, **options):
        begun.append(popen(*args, **options))
        return begun[-1]

    monkeypatch.setattr(side_by_side.subprocess, "Popen", spawn)

    def interrupt(seconds):
        monkeypatch.undo()
        os.kill(os.getpid(), side_by_side.signal.SIGTERM)

    monkeypatch.setattr(side_by_side.time, "sleep", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cells([cells[0], cells[2]], place, jobs=2, say=lambda line: None)
    assert [process.poll() for process in begun] == [-15, -15]
    assert time.monotonic() - started < 30


def test_an_unforeseen_error_is_logged_and_stops_no_other(cells, place, monkeypatch):
    run_cell = side_by_side.run_cell

    def broken(cell, place, **options):
        if cell.strategy == "plain":
            raise ZeroDivisionError("a bug")
        return run_cell(cell, place, **options)

    monkeypatch.setattr(side_by_side, "run_cell", broken)
    place.lock_of(cells[0]).parent.mkdir(parents=True)
    outcomes = run_cells([cells[0], cells[2]], place, progress=False, say=lambda line: None)
    assert [outcome.word for outcome in outcomes] == ["failed", "done"]
    assert outcomes[0].message == f"ZeroDivisionError: a bug (all of it: {place.log_of(cells[0])})"
    assert "in broken" in place.log_of(cells[0]).read_text()


def test_no_jobs(cells, place):
    with pytest.raises(ConfigError, match="--jobs 0"):
        run_cells(cells, place, jobs=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipes": ["paper"], "seeds": [3], "threads": 2},
        {"data": ["digits"], "networks": ["resnet20"], "epochs": 2},
    ],
)
def test_a_process_is_given_its_cell(options, shell, monkeypatch, tmp_path):
    """The command line that a process gets leads back to the cell and to the place."""
    asked = []

    def caught(cells, place, *, jobs, say):
        asked.append((*cells, place, jobs))
        return []

    monkeypatch.setattr(side_by_side, "run_cells", caught)
    place = Place(tmp_path / "runs", tmp_path / "results", str(tmp_path), "cpu", compile=True)
    for cell in Matrix(**options).cells()[-4:]:
        command = side_by_side.command_of(cell, place)
        assert command[:3] == [sys.executable, "-m", "shallowdeep"]
        code, _, errors = shell(*command[3:])
        assert code == 0, errors
        assert asked.pop() == (cell, place, 1)


WITH_TINY = "from studies.test_side_by_side import tiny; tiny(); from shallowdeep.cli import main; main()"


def tiny(table=NETWORKS):
    """Give a network that trains in a blink, with room for six exits, a name for the command line."""

    def build(num_classes, image_size):
        blocks = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(7))
        return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), *blocks, nn.Flatten(), nn.Linear(8 * 7 * 7, num_classes))

    table["tiny"] = build


@pytest.mark.slow
def test_by_the_command_line_side_by_side_as_alone(shell, monkeypatch, tmp_path):
    """The command as users type it, in this process and in two side by side, gives the same figures bit for bit."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setitem(NETWORKS, "tiny", None)  # taken out again afterwards
    tiny()
    command_of = side_by_side.command_of
    monkeypatch.setattr(
        side_by_side,
        "command_of",
        lambda cell, place: [sys.executable, "-c", WITH_TINY, *command_of(cell, place)[3:]],
    )
    asked = ("--data", "digits", "--network", "tiny", "--epochs", 1, "--only", "*/plain-*", "--only", "*/joint-*")
    for folder, jobs in (("alone", 1), ("beside", 2)):
        where = ("--runs", tmp_path / folder / "runs", "--results", tmp_path / folder / "results", "--device", "cpu")
        code, out, errors = shell("study", "paper", *asked, *where, "--jobs", jobs)
        assert code == 0, errors
        assert "2 of 2 cells are done" in out
    for strategy in ("plain", "joint"):
        name = f"digits/tiny/{strategy}-fast-1epochs-seed0"
        alone, beside = (read_result(tmp_path / folder / "results" / f"{name}.json") for folder in ("alone", "beside"))
        assert figures(alone) == figures(beside)
        assert (tmp_path / "beside" / "runs" / f"{name}.log").exists()  # it had a process of its own
