"""Small cells that are really run, and results made up for pages and verdicts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shallowdeep.analysis.budgets import BudgetRow, Budgets
from shallowdeep.analysis.confusion import Confusion
from shallowdeep.analysis.overthinking import Overthinking
from shallowdeep.config import RecipeChoice, RunConfig
from shallowdeep.studies.cells import Cell, Place
from shallowdeep.studies.paper.matrix import PASSES, Matrix
from shallowdeep.studies.results import CellResult, Provenance, Start
from shallowdeep.studies.side_by_side import run_cells
from shallowdeep.training.features import FeatureReuse

TINY = {"network": "studies.tiny_network:build", "taps": ("1", "3"), "val_size": 1000}  # 437 images to train on

STARTED = Start(
    revision="abc",
    started="2030-01-01T00:00:00+00:00",
    python="3.11.7",
    versions={"torch": "2.13.0"},
    processor="a processor",
    cores=2,
    threads=1,
    accelerator=None,
    compiled=False,
)


def small_cells(epochs: int = 1) -> list[Cell]:
    """The four cells of a network on digits, each trained in a second."""
    found: dict[str, Cell] = {}
    for cell in Matrix(data=["digits"], networks=["resnet20"], epochs=epochs).cells():
        init = None if cell.init is None else found[cell.init.name]
        rate = {} if cell.strategy == "ic_only" else {"lr": 0.02}
        recipe = cell.config.recipe.model_copy(update={"batch_size": 16, **rate})
        found[cell.name] = replace(cell, config=cell.config.model_copy(update={**TINY, "recipe": recipe}), init=init)
    return list(found.values())


@pytest.fixture
def cells() -> list[Cell]:
    """Plain, IC-only, joint and mixed, an epoch each."""
    return small_cells()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place with nothing in it."""
    return Place(tmp_path / "runs", tmp_path / "results", device="cpu")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place in which the four small cells are done; not to be changed."""
    folder = tmp_path_factory.mktemp("study")
    place = Place(folder / "runs", folder / "results", device="cpu")
    outcomes = run_cells(small_cells(), place, say=lambda line: None)
    assert [outcome.word for outcome in outcomes] == ["done"] * 4, outcomes
    return place


@pytest.fixture(scope="session")
def make_result() -> Callable[..., CellResult]:
    """Makes a result up: what is not said of it is that of a mediocre run on complete CIFAR-100."""

    def make(
        strategy: str = "plain",
        *,
        data: str = "cifar100",
        network: str = "vgg16",
        seed: int = 0,
        accuracy: float = 0.70,
        val_accuracy: float = 0.70,
        within: dict[float | None, tuple[float, float] | None] | None = None,
        as_published: dict[float | None, tuple[float, float] | None] | None = None,
        curve: list[tuple[float, float, float]] | None = None,
        wasteful: float = 0.8,
        destructive: float = 0.5,
        confusion: dict[str, float] | None = None,
        label_smoothing: float | None = None,
        epochs: int | None = None,
        recipe: str = "fast",
        n_train: int = 45_000,
        n_val: int = 5_000,
        threads: int = 1,
        passes: int | None = None,
        starts: tuple[Start, ...] = (STARTED,),
    ) -> CellResult:
        exits = strategy != "plain"
        recorded = PASSES[recipe] if strategy == "ic_only" else 0
        shares = (0.4, 0.6, accuracy) if exits else (accuracy,)
        length = "" if epochs is None else f"-{epochs}epochs"
        return CellResult(
            name=f"{data}/{network}/{strategy}-{recipe}{length}-seed{seed}",
            strategy=strategy,
            config=RunConfig(
                data=data,
                network=network,
                strategy="joint" if strategy == "mixed" else strategy,
                recipe=RecipeChoice(name=recipe, epochs=epochs, label_smoothing=label_smoothing),
                seed=seed,
                threads=threads,
                features=FeatureReuse(passes=(recorded if passes is None else passes)),
                init=f"{data}/{network}/plain" if strategy in ("ic_only", "mixed") else None,
            ),
            n_train=n_train,
            n_val=n_val,
            n_test=10_000,
            taps=("a", "b") if exits else (),
            plain_flops=1e9,
            costs=(0.2, 0.5, 1.01) if exits else (1.0,),
            val_accuracy=(0.4, 0.6, val_accuracy)[-len(shares) :] if n_val else None,
            overthinking=Overthinking(
                n=10_000,
                accuracy=shares,
                cumulative=(0.4, 0.65, 0.85) if exits else shares,
                first_correct=(0.4, 0.25, 0.2) if exits else shares,
                wasteful=wasteful if exits else 0.0,
                wasteful_and_right=0.6 if exits else 0.0,
                destructive=0.15 if exits else 0.0,
                destructive_of_errors=destructive if exits else 0.0,
                destructive_at=(0.1, 0.1, 0.0) if exits else (0.0,),
                oracle_cost=0.5 if exits else 1.0,
                oracle_cost_nominal=None,
            ),
            budgets=budgets(within or {}) if exits else None,
            budgets_as_published=budgets(as_published) if as_published else None,
            curve=points(curve or []) if exits else None,
            confusion=made_confusion(**(confusion or {})) if exits else None,
            epochs=epochs or (10 if strategy == "ic_only" else 30),
            seconds=600.0,
            provenance=Provenance(command="shallowdeep study paper --only made-up", starts=starts, data_md5={}),
        )

    return make


def budgets(within: dict[float | None, tuple[float, float] | None]) -> Budgets:
    """The paper's columns, of accuracy and cost by budget; 60 % at the budget where nothing is said."""
    rows = []
    for budget in (0.25, 0.5, 0.75, None):
        accuracy, cost = within.get(budget, (0.6, budget or 1.0)) or (None, None)
        threshold = None if accuracy is None else 0.9
        chosen = None if accuracy is None else accuracy + 0.01
        rows.append(BudgetRow(budget, threshold, accuracy, cost, accuracy, cost, chosen, cost))
    return Budgets(tuple(rows), 0.7, 10_000)


def points(curve: list[tuple[float, float, float]]) -> Budgets:
    """A curve from (accuracy on validation, accuracy on test, cost on test), cheap to dear."""
    rows = [BudgetRow(cost, 0.9, val, cost, accuracy, cost, accuracy, cost) for val, accuracy, cost in curve]
    return Budgets(tuple(rows), 0.7, 10_000)


def made_confusion(
    missed: float = 0.3, missed_by_confidence: float = 0.2, area: float = 0.7, area_of_confidence: float = 0.8
) -> Confusion:
    """Confusion that finds fewer errors than confidence, unless told otherwise."""
    areas = {"confusion": area, "max-softmax": area_of_confidence, "entropy": area_of_confidence}
    risks = dict.fromkeys(areas, 0.1)
    return Confusion(
        n=10_000,
        mean_correct=-0.3,
        mean_wrong=0.7,
        wrong_below_correct_mean=missed,
        correct_above_wrong_mean=0.1,
        confidence_correct=0.9,
        confidence_wrong=0.7,
        wrong_above_correct_mean_confidence=missed_by_confidence,
        auroc=areas,
        aurc=risks,
        risk_at_80=risks,
        risk_at_90=risks,
    )
