"""A cell is trained, measured and written; killed, it goes on; what is damaged is named and left alone."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from studies.conftest import TINY, small_cells

from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.runs.run import Run
from shallowdeep.storage import read_json, write_json
from shallowdeep.studies import cells as cells_module
from shallowdeep.studies import measurement
from shallowdeep.studies.cells import Place, is_usable, run_cell, state_of
from shallowdeep.studies.results import read_result
from shallowdeep.studies.side_by_side import run_cells

TESTS = Path(__file__).parents[1]


def copied(finished: Place, tmp_path: Path) -> Place:
    """A place of one's own, in which the four cells are done."""
    for name in ("runs", "results"):
        shutil.copytree(getattr(finished, name), tmp_path / name)
    return Place(tmp_path / "runs", tmp_path / "results", device="cpu")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures(result) -> dict:
    """All of a result that must come out again."""
    values = result.to_dict()
    del values["seconds"], values["epoch_seconds"], values["provenance"]["starts"]
    return values


def test_unsure_samples_are_answered_by_both_rules(finished, cells, monkeypatch):
    asked, joint = [], cells[2]

    def see(val, test, *, budgets, answer):
        asked.append((len(budgets), answer))
        return measured(val, test, budgets=budgets, answer=answer)

    measured = measurement.measure_budgets
    monkeypatch.setattr(measurement, "measure_budgets", see)
    run = Run.open(finished.run_of(joint))
    traces = {split: run.trace(split) for split in ("train", "val", "test")}
    what = {"name": joint.name, "strategy": joint.strategy, "config": joint.config, "command": joint.command}
    found = measurement.measure(run, run.load(), traces, **what)
    assert asked == [(4, "last"), (4, "most_confident"), (37, "last")]
    assert found.budgets_as_published == measured(traces["val"], traces["test"], answer="most_confident")


def test_results_of_the_four_cells(finished, cells):
    plain, ic_only, joint, mixed = (read_result(finished.result_of(cell)) for cell in cells)
    assert [r.strategy for r in (plain, ic_only, joint, mixed)] == ["plain", "ic_only", "joint", "mixed"]
    assert [r.config.strategy for r in (plain, ic_only, joint, mixed)] == ["plain", "ic_only", "joint", "joint"]
    assert [r.config.init for r in (plain, ic_only, joint, mixed)] == [None, plain.name, None, plain.name]
    assert plain.name == "digits/resnet20/plain-fast-1epochs-seed0"
    assert {(r.n_train, r.n_val, r.n_test) for r in (plain, ic_only, joint, mixed)} == {(437, 1000, 360)}
    assert plain.budgets is None
    assert plain.curve is None
    assert ic_only.accuracy == plain.accuracy  # the frozen network is the plain one
    assert mixed.overthinking != joint.overthinking
    assert min(plain.accuracy, joint.accuracy, mixed.accuracy) > 0.5  # it has learnt something
    assert [row.budget for row in ic_only.budgets.table] == [0.25, 0.5, 0.75, None]
    assert [row.budget for row in joint.curve.table][-1] == 1.0
    assert len(joint.costs) == len(joint.overthinking.accuracy) == len(joint.val_accuracy) == 3
    assert plain.budgets_as_published is None
    assert joint.taps == ("1", "3")
    assert joint.epochs == 1
    assert joint.seconds > 0
    assert joint.provenance.command == f"shallowdeep study paper --only {joint.name} --data digits " + (
        "--network resnet20 --epochs 1"
    )
    assert set(joint.provenance.data_md5) == {"train", "val", "test"}


def test_nothing_of_the_machine_is_in_a_result(finished, cells):
    for cell in cells:
        assert str(finished.runs.parent) not in finished.result_of(cell).read_text()


def test_a_cell_that_is_done_is_only_read(finished, cells, tmp_path):
    place = copied(finished, tmp_path)
    before, said = files(tmp_path), []
    assert [outcome.word for outcome in run_cells(cells, place, say=said.append)] == ["done"] * 4
    assert said == []
    assert files(tmp_path) == before
    assert not list(place.runs.rglob("checkpoint.pt"))


def test_the_place_does_not_matter(finished, cells, tmp_path):
    place = copied(finished, tmp_path)  # the run folders' configurations still name the place they come from
    place = replace(place, data_dir=str(tmp_path), device="cuda")
    assert [state_of(cell, place).word for cell in cells] == ["done"] * 4
    joint = cells[2]
    place.result_of(joint).unlink()
    assert state_of(joint, place) == cells_module.State("begun", 1)
    exits = cells[1]
    config = read_json(place.run_of(exits) / "config.json")
    config["features"]["folder"] = "elsewhere"
    write_json(place.run_of(exits) / "config.json", config)
    place.result_of(exits).unlink()
    assert state_of(exits, place) == cells_module.State("begun", 1)
    mixed = cells[3]
    place.result_of(mixed).unlink()
    assert state_of(mixed, place) == cells_module.State("begun", 1)
    run_cell(mixed, replace(place, data_dir=None, device="cpu"))
    assert figures(read_result(place.result_of(mixed))) == figures(read_result(finished.result_of(mixed)))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from studies.conftest import small_cells
from shallowdeep.studies.cells import Place, run_cell
from shallowdeep.training.checkpoint import Checkpoint

save = Checkpoint.save
def save_and_die(self, sdn, optimizer, phase, epochs, history):
    save(self, sdn, optimizer, phase, epochs, history)
    if epochs == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save_and_die
folder = Path(sys.argv[1])
run_cell(small_cells(epochs=3)[2], Place(folder / "runs", folder / "results", device="cpu"))
"""


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_figures(tmp_path, place):
    joint = small_cells(epochs=3)[2]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -9
    assert state_of(joint, place) == cells_module.State("begun", 2)
    history = place.run_of(joint) / "history.jsonl"
    done = history.read_text()
    found = run_cell(joint, place)
    assert history.read_text().startswith(done)  # the two epochs were not trained again: their seconds are the same
    assert found.seconds > sum(json.loads(line)["seconds"] for line in done.splitlines())
    whole = run_cell(joint, Place(tmp_path / "others", tmp_path / "other_results", device="cpu"))
    assert figures(found) == figures(whole)
    assert len(found.provenance.starts) == 2
    assert found.epochs == 3


def test_blocked_until_its_network_is_there(cells, place, finished, tmp_path):
    ic_only = cells[1]
    state = state_of(ic_only, place)
    assert state.word == "blocked"
    assert f"starts from {cells[0].name}, which is not done" in state.note
    assert "shallowdeep study paper --only digits/resnet20/plain-fast-1epochs-seed0" in state.note
    with pytest.raises(ConfigError, match="which is not done"):
        run_cell(ic_only, place)
    # A committed result without the weights is no network to start from.
    shutil.copytree(finished.results, place.results)
    place.result_of(ic_only).unlink()
    assert "which has a result and no weights" in state_of(ic_only, place).note


def test_no_cell_starts_from_one_of_another_configuration(finished, cells, tmp_path):
    place = copied(finished, tmp_path)
    plain, ic_only = (replace(cell, config=cell.config.model_copy(update={"threads": 2})) for cell in cells[:2])
    ic_only = replace(ic_only, init=plain)
    place.result_of(ic_only).unlink()
    shutil.rmtree(place.run_of(ic_only))
    assert not is_usable(plain, place)
    state = state_of(ic_only, place)
    assert state.word == "blocked"
    assert "is the result of another configuration (threads)" in state.note
    outcomes = run_cells([plain, ic_only], place, progress=False, say=lambda line: None)
    assert [outcome.word for outcome in outcomes] == ["failed", "failed"]
    assert not place.run_of(ic_only).exists()
    # Nor from weights of another configuration, whatever the result beside them says.
    write_json(
        place.result_of(plain),
        {**read_json(place.result_of(plain)), "config": cells_module.essence(plain).model_dump(mode="json")},
    )
    assert state_of(plain, place).word == "done"
    assert "holds a run of another configuration (threads)" in state_of(ic_only, place).note


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[: len(text) // 2], "as JSON"),
        (lambda text: json.dumps({**json.loads(text), "n_test": "many"}), "n_test"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "costs"}), "costs"),
        (lambda text: json.dumps({**json.loads(text), "color": 1}), "color"),
        (lambda text: text.replace('"wasteful":', '"also": 1, "wasteful":'), "overthinking.also"),
    ],
)
def test_damaged_result_is_named_and_kept(finished, cells, tmp_path, damage, why):
    place = copied(finished, tmp_path)
    path = place.result_of(cells[2])
    path.write_text(damage(path.read_text()))
    before, said = files(tmp_path), []
    state = state_of(cells[2], place)
    assert state.word == "damaged"
    assert str(path) in state.note
    assert why in state.note
    outcomes = run_cells(cells, place, say=said.append)
    assert [outcome.word for outcome in outcomes] == ["done", "done", "failed", "done"]
    assert str(path) in outcomes[2].message
    assert files(tmp_path) == before


def test_result_of_another_configuration_is_kept(finished, cells, tmp_path):
    place = copied(finished, tmp_path)
    other = replace(cells[0], config=cells[0].config.model_copy(update={"threads": 2}))
    before = files(tmp_path)
    assert state_of(other, place).word == "other"
    assert "(threads)" in state_of(other, place).note
    with pytest.raises(ConfigError, match="another configuration"):
        run_cell(other, place)
    place.result_of(other).unlink()
    assert "holds a run of another configuration (threads)" in state_of(other, place).note
    assert files(place.runs) == {k.removeprefix("runs/"): v for k, v in before.items() if k.startswith("runs/")}


@pytest.mark.parametrize("name", ["config.json", "sdn.safetensors", "history.jsonl", "environment.json"])
def test_damaged_run_folder_is_named(finished, cells, tmp_path, name):
    place = copied(finished, tmp_path)
    joint, others = cells[2], [cells[0], cells[1], cells[3]]
    place.result_of(joint).unlink()
    path = place.run_of(joint) / name
    path.write_bytes(path.read_bytes()[:20])
    before = {other.name: files(place.run_of(other)) for other in others}
    outcomes = run_cells(cells, place, progress=False, say=lambda line: None)
    assert [outcome.word for outcome in outcomes] == ["done", "done", "failed", "done"]
    assert str(path) in outcomes[2].message
    assert not place.result_of(joint).exists()
    assert {other.name: files(place.run_of(other)) for other in others} == before


def test_damaged_checkpoint_is_named(cells, place):
    joint = cells[2]
    run_cell(joint, place)
    place.result_of(joint).unlink()
    (place.run_of(joint) / "sdn.safetensors").unlink()
    (place.run_of(joint) / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(FileFormatError, match=r"checkpoint.pt is damaged or foreign"):
        run_cell(joint, place)


def test_two_processes_are_not_at_one_cell(cells, place):
    joint = cells[2]
    place.lock_of(joint).parent.mkdir(parents=True)
    with FileLock(place.lock_of(joint)):
        assert state_of(joint, place).word == "running"
        with pytest.raises(ConfigError, match="is being run by another process"):
            run_cell(joint, place)
        [outcome] = run_cells([joint], place, say=lambda line: None)
        assert outcome.word == "left"
    assert state_of(joint, place).word == "missing"


def test_who_only_looks_is_not_at_it(cells, place, monkeypatch):
    joint = cells[2]
    place.lock_of(joint).parent.mkdir(parents=True)
    monkeypatch.setattr(cells_module, "LOOK_S", 10.0)  # however slow the machine of this test
    look = FileLock(place.lock_of(joint), thread_local=False)
    look.acquire()
    threading.Timer(0.05, look.release).start()
    assert state_of(joint, place).word == "missing"


def test_where_it_was_begun_and_gone_on_with_is_kept(finished, cells, tmp_path):
    place = copied(finished, tmp_path)
    joint = cells[2]
    path = place.run_of(joint) / "environment.json"
    last = read_json(path)
    first = {**last, "threads": 8, "accelerator": "a device", "command": "shallowdeep study paper --compile"}
    write_json(path, {**last, "earlier": [first]})
    place.result_of(joint).unlink()
    starts = run_cell(joint, place).provenance.starts
    assert [(start.threads, start.accelerator, start.compiled) for start in starts] == [
        (8, "a device", True), (1, None, False),
    ]  # fmt: skip


def test_full_disk_costs_this_cell_its_result_alone(cells, place, monkeypatch):
    plain, _, joint, _ = cells
    write = cells_module.write_json

    def no_room(path, value):
        if path == place.result_of(plain):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(cells_module, "write_json", no_room)
    outcomes = run_cells([plain, joint], place, progress=False, say=lambda line: None)
    assert [outcome.word for outcome in outcomes] == ["failed", "done"]
    assert "No space left on device" in outcomes[0].message
    assert not place.result_of(plain).exists()
    assert state_of(plain, place) == cells_module.State("begun", 1)


def test_small_cells_are_of_the_matrix(cells):
    assert all(cell.config.model_copy(update=TINY) == cell.config for cell in cells)
