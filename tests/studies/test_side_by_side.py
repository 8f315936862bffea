"""Cells side by side, each in a process of its own, say what cells alone say; one that fails stops no other."""

import os
import sys
import time
from pathlib import Path

import pytest
from studies.test_cells import figures

from shallowdeep.errors import ConfigError
from shallowdeep.studies import side_by_side
from shallowdeep.studies.cells import Place, state_of
from shallowdeep.studies.paper import paper_cells
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


@pytest.mark.long
def test_side_by_side_as_alone(children, cells, finished, place):
    said = []
    outcomes = run_cells(cells[:3], place, jobs=2, say=said.append)
    assert [outcome.word for outcome in outcomes] == ["done"] * 3, outcomes
    for cell in cells[:3]:
        alone, beside = (read_result(where.result_of(cell)) for where in (finished, place))
        assert figures(alone) == figures(beside)
    plain, ic_only, joint = (cell.name for cell in cells[:3])
    assert said[:2] == [f"{plain}: begins", f"{joint}: begins"]  # IC-only waits for its network
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
    for cell in paper_cells(**options)[-4:]:
        command = side_by_side.command_of(cell, place)
        assert command[:3] == [sys.executable, "-m", "shallowdeep"]
        code, _, errors = shell(*command[3:])
        assert code == 0, errors
        assert asked.pop() == (cell, place, 1)


@pytest.mark.long
def test_by_the_command_line(shell, tmp_path):
    """The command as users type it: ResNet-20 on digits, plain and IC-only, in this process and in two."""
    options = [
        "--data",
        "digits",
        "--network",
        "resnet20",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--only",
        "*/plain*",
        "--only",
        "*/ic_only*",
    ]
    for folder, jobs in (("alone", 1), ("beside", 2)):
        place = tmp_path / folder
        code, out, errors = shell(
            "study", "paper", *options, "--jobs", jobs, "--runs", place / "runs", "--results", place / "results"
        )
        assert code == 0, errors
        assert "2 of 2 cells are done" in out
    names = [str(path.relative_to(tmp_path / "alone")) for path in (tmp_path / "alone" / "results").rglob("*.json")]
    assert len(names) == 2
    for name in names:
        assert figures(read_result(tmp_path / "alone" / name)) == figures(read_result(tmp_path / "beside" / name))
