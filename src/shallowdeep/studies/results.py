"""What a cell of a study found, as one small file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from shallowdeep.analysis.backdoor import BackdoorEffect
from shallowdeep.analysis.budgets import BudgetRow, Budgets
from shallowdeep.analysis.confusion import Confusion
from shallowdeep.analysis.overthinking import Overthinking
from shallowdeep.config import RunConfig
from shallowdeep.errors import FileFormatError
from shallowdeep.storage import read_as, read_json
from shallowdeep.studies.tasks import TASKS, is_complete
from shallowdeep.training.recipes import Trains

MIN_EPOCHS = 20
"""Shortest training of a network that says something of the paper: its cells are meant to be run for 20 to 30 epochs
where time is short, and as long as their recipe says where it is not. A shorter one tries the chain out."""

BACKDOORS = "backdoor"
"""Folder beside the data sets' own, for what backdoors did: files as ``results/backdoor.json`` of attacked runs."""

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Start(BaseModel):
    """Where and with what a training was begun, or gone on with after it was stopped.

    Attributes:
        revision: of the package; ``None``: it was installed, not run from its repository.
        started: when.
        accelerator: ``None``: a CPU alone.
        compiled: whether PyTorch's compiler made the training step.
    """

    model_config = _FROZEN

    revision: str | None
    started: str
    python: str
    versions: dict[str, str]
    processor: str
    cores: int
    threads: int
    accelerator: str | None
    compiled: bool

    @property
    def place(self) -> str:
        """What figures and times depend on, in a line."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        hardware = self.accelerator or f"{self.processor}, {threads}"
        compiled = ", compiled" if self.compiled else ""
        return f"{hardware}{compiled}; PyTorch {self.versions.get('torch', '?')}, Python {self.python}"


class Provenance(BaseModel):
    """Hardware, versions, data and command behind a result.

    Attributes:
        command: that makes the cell again.
        starts: of the training, in their order; more than one where it was stopped and gone on with.
        data_md5: split to fingerprints of its images and labels.
    """

    model_config = _FROZEN

    command: str
    starts: tuple[Start, ...] = Field(min_length=1)
    data_md5: dict[str, dict[str, str]]

    @property
    def places(self) -> tuple[str, ...]:
        """Of all starts, each once, the first first."""
        return tuple(dict.fromkeys(start.place for start in self.starts))


class CellResult(BaseModel):
    """What a cell found on the test split; all shares in [0, 1].

    Attributes:
        name: of the cell.
        strategy: as the study calls it; ``mixed`` is joint training that starts from a plain cell.
        config: of the run; ``init`` is a cell's name.
        n_train: images trained on.
        n_val: images that thresholds were chosen on; 0: there were none.
        n_test: images that all figures are of.
        taps: of the internal exits.
        plain_flops: of the network without exits, 2 per multiply-add.
        costs: of leaving at each exit, as a share of ``plain_flops``.
        val_accuracy: of each exit on validation; ``None``: there was none.
        overthinking: of the test split; per-exit and cumulative accuracy are in it.
        budgets: the paper's columns; ``None``: no internal exits.
        budgets_as_published: the same columns by the paper's rule for samples that no exit is sure of: the most
            confident exit's answer, not the last one's; ``None``: not measured.
        curve: the columns in many small steps of cost; ``None``: not measured.
        confusion: ``None``: not measured, ``notes`` say why.
        notes: what could not be measured.
        epochs: trained, those of the cell it starts from not counted.
        seconds: that they took on the clock, validation not counted, minutes when the training was stopped counted.
        epoch_seconds: of an epoch, in the median; ``None``: not kept.
        precisions: of the arithmetic of training, in the order in which they were used; empty: not kept.
        provenance: what the figures rest on.
    """

    model_config = _FROZEN

    name: str
    strategy: str
    config: RunConfig
    n_train: int = Field(gt=0)
    n_val: int = Field(ge=0)
    n_test: int = Field(gt=0)
    taps: tuple[str, ...]
    plain_flops: float = Field(gt=0)
    costs: tuple[float, ...]
    val_accuracy: tuple[float, ...] | None
    overthinking: Overthinking
    budgets: Budgets | None
    budgets_as_published: Budgets | None = None
    curve: Budgets | None
    confusion: Confusion | None
    notes: tuple[str, ...] = ()
    epochs: int = Field(gt=0)
    seconds: float = Field(ge=0)
    epoch_seconds: float | None = Field(default=None, ge=0)
    precisions: tuple[str, ...] = ()
    provenance: Provenance

    @property
    def accuracy(self) -> float:
        """Of the last exit on the test split."""
        return self.overthinking.accuracy[-1]

    @property
    def pair(self) -> tuple[Any, ...]:
        """What this cell shares with the plain network it is compared with, and with its other strategies."""
        recipe = self.config.recipe
        return self.config.data, self.config.network, recipe.name, recipe.epochs, self.config.seed

    @property
    def length(self) -> int:
        """Epochs that its network was trained for; IC-only, in the plain cell it starts from."""
        return self.config.recipe.build("backbone", self.config.network).epochs

    @property
    def training_seconds(self) -> float:
        """Of the median epoch, times the epochs: without pauses. Where epochs were not kept, all the seconds.

        Recording features, where the exits were trained on such, is counted as it was.
        """
        if self.epoch_seconds is None or self.config.features.passes:
            return self.seconds
        return self.epoch_seconds * self.epochs

    @property
    def label_smoothing(self) -> float:
        """Of the recipe that trained it; it changes every confidence."""
        trains: Trains = "exits" if self.config.strategy == "ic_only" else "all"
        return self.config.recipe.build(trains, self.config.network).label_smoothing

    @property
    def flaws(self) -> tuple[str, ...]:
        """Why its figures are no match for published ones; empty where they are."""
        data, images = self.config.data, self.n_train + self.n_val
        found = [] if is_complete(data, images) else [f"{images:,} training images of {TASKS[data].num_images:,}"]
        if self.length < MIN_EPOCHS:
            found.append(f"{self.length} epoch{'' if self.length == 1 else 's'}, fewer than {MIN_EPOCHS}")
        return tuple(found)

    def within(self, budget: float | None, *, as_published: bool = False) -> BudgetRow | None:
        """The paper's column of that name; ``None`` for a network without internal exits, or where it was not measured.

        Args:
            budget: as a share of the plain network's cost; ``None``: any.
            as_published: unsure samples are answered by the paper's rule.
        """
        found = self.budgets_as_published if as_published else self.budgets
        rows = () if found is None else found.table
        return next((row for row in rows if row.budget == budget), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; ``read_result`` reads them back."""
        return self.model_dump(mode="json")


def read_result(path: str | os.PathLike[str]) -> CellResult:
    """Read back what a cell wrote.

    Raises:
        FileFormatError: the file is missing or damaged, lacks a field, or has one that this version does not know.
    """
    values = read_json(path)
    try:
        return read_as(CellResult, values)
    except TypeError as error:
        raise FileFormatError(
            f"{path} is no result of a cell ({error}). Remove it to have it written anew from the cell's run."
        ) from None


def read_results(folder: str | os.PathLike[str]) -> list[CellResult]:
    """Every cell's result under a folder, by name; what backdoors did stays with ``find_backdoors``.

    Raises:
        FileFormatError: some are damaged; all of them are named.
    """
    found, errors, backdoors = [], [], Path(folder) / BACKDOORS
    for path in sorted(Path(folder).rglob("*.json")):
        if path.is_relative_to(backdoors):
            continue
        try:
            found.append(read_result(path))
        except FileFormatError as error:
            errors.append(
                f"{path} is of an attacked run: move it to {backdoors}." if _is_backdoor(path) else str(error)
            )
    if errors:
        raise FileFormatError("\n".join(errors))
    return sorted(found, key=lambda result: result.name)


def _is_backdoor(path: Path) -> bool:
    try:
        read_backdoor(path)
    except FileFormatError:
        return False
    return True


def find_backdoors(folder: str | os.PathLike[str]) -> list[Path]:
    """Files that say what backdoors did, beside the cells' results."""
    return sorted((Path(folder) / BACKDOORS).rglob("*.json"))


class BackdoorResult(BaseModel):
    """What a backdoor did to a network, and the configuration of the run that its exits come from."""

    model_config = _FROZEN

    config: RunConfig
    effect: BackdoorEffect


class _Configured(BaseModel):
    """A file that says, among other things, how its run was configured."""

    config: RunConfig


def read_backdoor(path: str | os.PathLike[str]) -> BackdoorResult:
    """Read a run's ``results/backdoor.json``.

    Raises:
        FileFormatError: the file is missing or damaged, or does not say what run it is of.
    """
    values = read_json(path)
    try:
        return BackdoorResult(config=read_as(_Configured, values).config, effect=read_as(BackdoorEffect, values))
    except TypeError as error:
        raise FileFormatError(
            f"{path} is no result of a backdoor study ({error}). Give the results/backdoor.json that "
            "shallowdeep analyze wrote."
        ) from None
