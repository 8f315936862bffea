"""The table of the Shallow-Deep Networks paper as cells: four networks, three data sets, four strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from shallowdeep.config import RecipeChoice, RunConfig
from shallowdeep.data.sources import data_sets
from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.networks.zoo import networks as known_networks
from shallowdeep.studies.cells import Cell
from shallowdeep.studies.tasks import TASKS
from shallowdeep.training.features import FeatureReuse
from shallowdeep.training.recipes import RECIPES

DATA = ("cifar10", "cifar100", "tinyimagenet")
NETWORKS = ("vgg16", "resnet56", "wrn32_4", "mobilenet")
STRATEGIES = ("plain", "ic_only", "joint", "mixed")
PASSES = {"fast": 4, "paper": 0}
"""Recipe to the passes over the training data whose features are recorded for IC-only training; 0: as published."""


@dataclass(frozen=True)
class Matrix:
    """Which cells are asked for; without a word, the paper's, under one seed of the short recipe.

    ``ic_only`` and ``mixed`` start from the plain cell of the same seed: ``mixed`` is joint training on its
    backbone, so that the plain phase is not trained twice. Under the recipe ``paper`` no training image is held
    out.

    Attributes:
        data: names of data sets.
        networks: names of our networks.
        recipes: ``fast``, ``paper``.
        seeds: of initial weights, order and augmentation.
        epochs: length of every training, instead of the recipe's own.
        threads: of the CPU, in each cell.
        passes: over the training data whose features are recorded for IC-only training, instead of the recipe's own;
            0: the backbone runs in every epoch, which is less work where it is fast and disks are slow.

    Raises:
        UnknownName: there is no such data set, network or recipe.
        ConfigError: a number is out of range.
    """

    data: Sequence[str] = DATA
    networks: Sequence[str] = NETWORKS
    recipes: Sequence[str] = ("fast",)
    seeds: Sequence[int] = (0,)
    epochs: int | None = None
    threads: int = 1
    passes: int | None = None

    def __post_init__(self):
        for kind, names, known in (
            ("data set", self.data, data_sets()),
            ("network", self.networks, known_networks()),
            ("recipe", self.recipes, RECIPES),
        ):
            for name in names:
                if name not in known:
                    raise UnknownName(kind, name, known)
        if (
            (self.epochs is not None and self.epochs < 1)
            or self.threads < 1
            or min(*self.seeds, self.passes or 0, 0) < 0
        ):
            raise ConfigError(
                "epochs and threads are from 1 on, seeds and passes from 0; "
                f"got {self.epochs}, {self.threads}, {list(self.seeds)}, {self.passes}."
            )

    def cells(self) -> list[Cell]:
        """All of them, each after the one it starts from."""
        groups = product(self.recipes, self.seeds, self.data, self.networks)
        return [cell for group in groups for cell in self._four_cells(*group)]

    def command(self, only: Sequence[str]) -> tuple[str, ...]:
        """Arguments of ``shallowdeep`` that run some of the cells, by names or patterns of ``select``."""
        words = ["study", "paper", *(word for name in only for word in ("--only", name))]
        words += [] if set(self.data) <= set(DATA) else [word for name in self.data for word in ("--data", name)]
        if not set(self.networks) <= set(NETWORKS):
            words += [word for name in self.networks for word in ("--network", name)]
        if tuple(self.recipes) != Matrix.recipes:
            words += [word for name in self.recipes for word in ("--recipe", name)]
        if self.epochs is not None:
            words += ["--epochs", str(self.epochs)]
        if tuple(self.seeds) != Matrix.seeds:
            words += ["--seeds", ",".join(map(str, self.seeds))]
        if self.threads != Matrix.threads:
            words += ["--threads", str(self.threads)]
        if self.passes is not None:
            words += ["--passes", str(self.passes)]
        return tuple(words)

    def _four_cells(self, recipe: str, seed: int, data: str, network: str) -> list[Cell]:
        shared: dict[str, Any] = {
            "data": data,
            "network": network,
            "image_size": TASKS[data].image_size if data in TASKS else None,
            "recipe": RecipeChoice(name=recipe, epochs=self.epochs),
            "seed": seed,
            "threads": self.threads,
            "val_size": 0 if recipe == "paper" else None,
        }
        length = "" if self.epochs is None else f"-{self.epochs}epochs"
        reuse = FeatureReuse(passes=PASSES.get(recipe, 0) if self.passes is None else self.passes)
        kinds: dict[str, dict[str, Any]] = {
            "plain": {"strategy": "plain"},
            "ic_only": {"strategy": "ic_only", "features": reuse},
            "joint": {"strategy": "joint"},
            "mixed": {"strategy": "joint"},
        }
        alone = replace(self, data=(data,), networks=(network,), recipes=(recipe,), seeds=(seed,))
        found: dict[str, Cell] = {}
        for strategy, changes in kinds.items():
            name = f"{data}/{network}/{strategy}-{recipe}{length}-seed{seed}"
            found[strategy] = Cell(
                name=name,
                strategy=strategy,
                config=RunConfig(**shared, **changes),
                command=alone.command([name]),
                init=found["plain"] if strategy in ("ic_only", "mixed") else None,
            )
        return list(found.values())
