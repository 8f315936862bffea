"""The matrix of cells, and the command that lists and runs it."""

import pytest

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.studies.cells import Place, run_cell
from shallowdeep.studies.paper.matrix import Matrix
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


def test_complete_data():
    assert is_complete("cifar10", 50_000)
    assert not is_complete("tinyimagenet", 15_000)
    assert is_complete("trec", 5)


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
