"""Cells as rows: done, begun, blocked, what they still cost, and results besides."""

import json
import shutil

import pytest
from studies.conftest import small_cells

from shallowdeep.studies.cells import Place
from shallowdeep.studies.estimates import measure_rates, training_flops
from shallowdeep.studies.listing import list_besides, list_cells
from shallowdeep.studies.paper.matrix import Matrix


def test_hours_by_other_networks_are_marked(place):
    cells = Matrix(data=["cifar10", "cifar100"], networks=["vgg16", "mobilenet"]).cells()
    begin(cells[0], place, [3600.0] * 10)
    rows = {row["cell"]: row["hours left"] for row in list_cells(cells, place)}
    assert rows["cifar100/vgg16/joint-fast-seed0"] == "30.00"
    assert rows["cifar10/mobilenet/joint-fast-seed0"].startswith("≈ ")


def begin(cell, place, seconds, accelerator=None):
    """A run folder as after some epochs."""
    folder = place.run_of(cell)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cell.config.model_dump(mode="json")))
    (folder / "environment.json").write_text(json.dumps({"accelerator": accelerator}))
    (folder / "history.jsonl").write_text("".join(json.dumps({"seconds": s}) + "\n" for s in seconds))
    (folder / "checkpoint.pt").touch()


def test_hours_left_from_the_epochs_done(place):
    cells = Matrix(data=["cifar10"], networks=["vgg16", "mobilenet"]).cells()
    vgg16, mobilenet = cells[0], cells[4]
    begin(vgg16, place, [3600.0] * 10)
    begin(mobilenet, place, [1.0], accelerator="another machine's")
    begin(Matrix(data=["cifar10"], networks=["vgg16"], epochs=20).cells()[2], place, [3600.0] * 4 + [90_000.0])
    rates = measure_rates(place)  # of runs of another length as well; an epoch that was stopped in its middle is none
    assert rates.measured == {("cifar10", "vgg16"): pytest.approx(training_flops(vgg16) / 30 / 3600)}
    rows = {row["cell"]: row for row in list_cells(cells, place)}
    assert rows[vgg16.name] == {
        "cell": vgg16.name,
        "state": "begun",
        "epochs": "10/30",
        "PFLOP left": "1.69",  # 20 epochs of 45,000 images at three times 0.627 GFLOPs
        "hours left": "20.00",
        "note": "",
    }
    assert rows["cifar10/vgg16/joint-fast-seed0"]["hours left"] == "30.00"
    assert rows["cifar10/vgg16/mixed-fast-seed0"]["state"] == "blocked"
    assert rows["cifar10/vgg16/mixed-fast-seed0"]["note"] == "after plain-fast-seed0"


def test_why_a_cell_waits_for_one_that_is_done(finished, cells, tmp_path):
    place = Place(tmp_path / "runs", finished.results)
    notes = {row["cell"]: row["note"] for row in list_cells(cells, place)}
    assert notes[cells[0].name] == notes[cells[1].name] == ""
    shutil.copytree(finished.results, tmp_path / "results")
    place = Place(tmp_path / "runs", tmp_path / "results")
    place.result_of(cells[3]).unlink()
    [row] = list_cells([cells[3]], place)
    assert row["state"] == "blocked"
    assert "plain-fast-1epochs-seed0, which has a result and no weights in" in row["note"]


def test_nothing_is_measured_yet(place):
    [row] = list_cells(Matrix(data=["cifar10"], networks=["resnet56"]).cells()[:1], place)
    assert row == {
        "cell": "cifar10/resnet56/plain-fast-seed0", "state": "missing", "epochs": "0/30", "PFLOP left": "1.02",
        "hours left": None, "note": "",
    }  # fmt: skip


def test_a_done_cell_costs_nothing_more(cells, finished):
    assert [row["state"] for row in list_cells(cells, finished)] == ["done"] * 4
    assert [row["epochs"] for row in list_cells(cells, finished)] == ["1/1"] * 4


def test_results_of_another_length_are_listed_besides(cells, finished, tmp_path):
    place = Place(finished.runs, tmp_path / "results")
    shutil.copytree(finished.results, place.results)
    longer = small_cells(epochs=2)
    [plain, *_] = list_besides(longer, place, ["*/plain-*"])
    assert plain == {
        "cell": cells[0].name, "state": "done", "epochs": "1/1", "PFLOP left": "0", "hours left": "0.00",
        "note": "asked for by --data digits --network resnet20 --epochs 1",
    }  # fmt: skip
    assert {row["cell"] for row in list_besides(longer, place)} == {cell.name for cell in cells}
    assert list_besides(cells, place) == []
    assert list_besides(Matrix(data=["digits"], networks=["vgg16"]).cells(), place) == []

    place.result_of(cells[1]).write_text("{")
    rows = {row["cell"]: row for row in list_besides(longer, place)}
    assert rows[cells[1].name]["state"] == "damaged"
    assert str(place.result_of(cells[1])) in rows[cells[1].name]["note"]
    assert len(rows) == len(cells)
