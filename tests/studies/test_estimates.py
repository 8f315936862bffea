"""What cells still cost, from FLOPs and from the trainings that lie there."""

import json

import pytest

from shallowdeep.studies.estimates import Rates, forward_flops, list_cells, measure_rates, training_flops
from shallowdeep.studies.paper.matrix import Matrix


def test_flops_are_those_of_the_network():
    assert forward_flops("vgg16", 10, 32) == 2 * 313_725_952  # the authors' 313.726 M multiply-adds
    plain, ic_only, joint, mixed = Matrix(data=["cifar10"], networks=["vgg16"], epochs=2).cells()
    one_pass = 45_000 * forward_flops("vgg16", 10, 32)
    assert training_flops(plain) == training_flops(joint) == training_flops(mixed) == 3 * 2 * one_pass
    assert training_flops(ic_only) == 4 * one_pass  # features of four passes
    published = Matrix(data=["cifar10"], networks=["vgg16"], recipes=["paper"]).cells()
    whole_pass = 50_000 * forward_flops("vgg16", 10, 32)
    assert [training_flops(cell) for cell in published[:2]] == [300 * whole_pass, 25 * whole_pass]


def test_rates_of_the_nearest_kind():
    plain, *_ = Matrix(data=["cifar10"], networks=["vgg16"]).cells()
    assert Rates({("cifar10", "vgg16"): 5.0, ("cifar100", "vgg16"): 9.0}).of(plain) == 5.0
    assert Rates({("cifar100", "vgg16"): 9.0, ("cifar10", "resnet56"): 1.0}).of(plain) == 9.0
    assert Rates({("cifar10", "wrn32_4"): 3.0, ("cifar10", "resnet56"): 1.0}).of(plain) == 2.0
    assert Rates({}).of(plain) is None


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
    rates = measure_rates(cells, place)
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


def test_nothing_is_measured_yet(place):
    [row] = list_cells(Matrix(data=["cifar10"], networks=["resnet56"]).cells()[:1], place)
    assert row == {
        "cell": "cifar10/resnet56/plain-fast-seed0", "state": "missing", "epochs": "0/30", "PFLOP left": "1.02",
        "hours left": None,
    }  # fmt: skip


def test_a_done_cell_costs_nothing_more(cells, finished):
    assert [row["state"] for row in list_cells(cells, finished)] == ["done"] * 4
    assert [row["epochs"] for row in list_cells(cells, finished)] == ["1/1"] * 4
