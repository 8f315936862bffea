"""The matrix of cells, what it costs, and the commands that list it."""

import json

import pytest

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.studies.cells import Place, run_cell
from shallowdeep.studies.estimates import (
    Rates,
    forward_flops,
    measure_rates,
    training_flops,
)
from shallowdeep.studies.paper import Matrix, list_cells, select
from shallowdeep.studies.tasks import is_complete


def test_the_matrix():
    cells = Matrix(recipes=["fast", "paper"], seeds=[0, 1]).cells()
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 3 * 4 * 4
    found = {cell.name: cell for cell in cells}
    plain = found["cifar100/vgg16/plain-fast-seed1"]
    assert (plain.config.data, plain.config.network, plain.config.seed) == ("cifar100", "vgg16", 1)
    assert plain.config.image_size == 32
    assert found["tinyimagenet/vgg16/plain-fast-seed1"].config.image_size == 64
    assert (plain.config.val_size, plain.config.threads, plain.epochs) == (None, 1, 30)
    ic_only, mixed = found["cifar100/vgg16/ic_only-fast-seed1"], found["cifar100/vgg16/mixed-fast-seed1"]
    assert ic_only.init == mixed.init == plain
    assert (ic_only.config.strategy, ic_only.config.features.passes, ic_only.epochs) == ("ic_only", 4, 10)
    assert (mixed.config.strategy, mixed.config.features.passes, mixed.epochs) == ("joint", 0, 30)
    published = found["cifar10/resnet56/ic_only-paper-seed0"]
    assert (published.config.val_size, published.config.features.passes, published.epochs) == (0, 0, 25)
    assert all(cells.index(cell.init) < cells.index(cell) for cell in cells if cell.init is not None)


def test_another_length_is_in_the_name():
    [plain, *_] = Matrix(data=["cifar10"], networks=["resnet56"], epochs=25).cells()
    assert plain.name == "cifar10/resnet56/plain-fast-25epochs-seed0"
    assert plain.epochs == 25


def test_passes_are_the_exits_cells_own():
    cells = Matrix(data=["cifar10"], networks=["resnet56"], passes=0).cells()
    assert [cell.config.features.passes for cell in cells] == [0, 0, 0, 0]
    assert all(cell.command[-2:] == ("--passes", "0") for cell in cells)


@pytest.mark.parametrize(
    "asked", [{"data": ["cifar11"]}, {"networks": ["resnet57"]}, {"recipes": ["slow"]}, {"networks": ["timm:vit"]}]
)
def test_unknown_names(asked):
    with pytest.raises(UnknownName):
        Matrix(**asked).cells()


@pytest.mark.parametrize("asked", [{"epochs": 0}, {"threads": 0}, {"seeds": [-1]}, {"passes": -1}])
def test_numbers_out_of_range(asked):
    with pytest.raises(ConfigError, match="from 1 on"):
        Matrix(**asked).cells()


def test_select():
    cells = Matrix().cells()
    assert select(cells, []) == cells
    found = select(cells, ["cifar10/*/joint-*", "tinyimagenet/vgg16/plain-fast-seed0", "cifar10/vgg16/*"])
    assert len(found) == 4 + 1 + 3
    assert [cells.index(cell) for cell in found] == sorted(cells.index(cell) for cell in found)
    with pytest.raises(
        ConfigError, match=r"no cell fits 'cifar10/resnet65/plain\*'. Near it: .*cifar10/resnet56/plain"
    ):
        select(cells, ["cifar10/*", "cifar10/resnet65/plain*"])


def test_flops_are_those_of_the_network():
    assert forward_flops("vgg16", 10, 32) == 2 * 313_725_952  # the authors' 313.726 M multiply-adds
    plain, ic_only, joint, mixed = Matrix(data=["cifar10"], networks=["vgg16"], epochs=2).cells()
    one_pass = 45_000 * forward_flops("vgg16", 10, 32)
    assert training_flops(plain) == training_flops(joint) == training_flops(mixed) == 3 * 2 * one_pass
    assert training_flops(ic_only) == 4 * one_pass  # features of four passes
    published = Matrix(data=["cifar10"], networks=["vgg16"], recipes=["paper"]).cells()
    whole_pass = 50_000 * forward_flops("vgg16", 10, 32)
    assert [training_flops(cell) for cell in published[:2]] == [300 * whole_pass, 25 * whole_pass]


def test_complete_data():
    assert is_complete("cifar10", 50_000)
    assert not is_complete("tinyimagenet", 15_000)
    assert is_complete("trec", 5)


def test_rates_of_the_nearest_kind():
    plain, *_ = Matrix(data=["cifar10"], networks=["vgg16"]).cells()
    assert Rates({("cifar10", "vgg16"): 5.0, ("cifar100", "vgg16"): 9.0}).of(plain) == 5.0
    assert Rates({("cifar100", "vgg16"): 9.0, ("cifar10", "resnet56"): 1.0}).of(plain) == 9.0
    assert Rates({("cifar10", "wrn32_4"): 3.0, ("cifar10", "resnet56"): 1.0}).of(plain) == 2.0
    assert Rates({}).of(plain) is None


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


def test_list_runs_nothing(shell, tmp_path, place):
    code, out, errors = shell(
        "study", "paper", "--list", "--only", "cifar10/resnet56/*", "--runs", place.runs, "--results", place.results
    )
    assert code == 0, errors
    assert "4 cells" in out
    assert out.count("plain-fast-seed0") == 3  # itself, and two that wait for it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--only", "cifar10/resnet65/plain-fast-seed0"], "Near it: cifar10/resnet56/plain-fast-seed0"),
        (["--network", "resnet57"], "no network 'resnet57'. Did you mean 'resnet56'?"),
        (["--seeds", "1;2"], "--seeds takes numbers with commas between them, e.g. 0,1,2; got '1;2'"),
        (["--table", "--results", "nowhere"], "no results under nowhere"),
    ],
)
def test_what_the_user_can_mend(shell, words, error):
    code, _, errors = shell("study", "paper", *words)
    assert code == 2
    assert error in errors


def test_missing_data_folder_leaves_no_run(shell, tmp_path):
    name = "cifar10/resnet56/plain-fast-seed0"
    code, out, errors = shell(
        "study", "paper", "--only", name, "--data-dir", tmp_path / "nowhere", "--device", "cpu",
        "--runs", tmp_path / "runs", "--results", tmp_path / "results",
    )  # fmt: skip
    assert code == 2
    assert f"error: {name}: no folder {tmp_path / 'nowhere' / 'cifar10'}" in errors
    assert "0 of 1 cells are done" in out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["plain-fast-seed0.lock"]


def test_missing_data_shard_is_named(cells, tmp_path, place):
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "train-00000-of-00002.parquet").touch()
    plain, *_ = Matrix(data=["cifar10"], networks=["resnet56"]).cells()
    with pytest.raises(Exception, match=r"lacks train-00001-of-00002\.parquet"):
        run_cell(plain, Place(place.runs, place.results, str(tmp_path / "data"), "cpu"))
    assert not place.run_of(plain).exists()
