"""Recipes: optimiser, schedule and length, as frozen values."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn, optim

from shallowdeep.errors import UnknownName

Trains = Literal["backbone", "exits", "all"]

Share = Annotated[float, Field(gt=0, lt=1)]


class Recipe(BaseModel):
    """How one phase is optimised; schedules are functions of progress in [0, 1), so any length fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(gt=0)
    batch_size: int = Field(default=128, gt=1)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(gt=0, description="peak learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd; adam's betas are PyTorch's")
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0, description="on every trained parameter, as the authors do")
    schedule: Literal["constant", "milestones", "one_cycle"] = "milestones"
    milestones: tuple[Share, ...] = Field(default=(), description="progress at which the rate is divided by ten")
    warmup: float = Field(default=0.25, gt=0, lt=1, description="share of a one-cycle schedule that rises")
    clip_norm: float | None = Field(default=None, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="changes every confidence; off by default")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="fp32", description="auto: bf16 where the device computes in it"
    )
    channels_last: bool = False

    @model_validator(mode="after")
    def _momentum_where_needed(self) -> Recipe:
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0: raise it, or set nesterov to false")
        return self

    def rate(self, progress: float) -> float:
        """Learning rate at a progress in [0, 1)."""
        return self.lr * self._factor(progress)

    def _factor(self, progress: float) -> float:
        if self.schedule == "milestones":
            return 0.1 ** sum(progress >= milestone for milestone in self.milestones)
        if self.schedule == "one_cycle":
            if progress < self.warmup:
                return 0.04 + 0.96 * progress / self.warmup
            return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        return 1.0

    def build_optimizer(self, parameters: list[nn.Parameter]) -> optim.Optimizer:
        """A fresh optimiser over some parameters."""
        shared: dict[str, Any] = {"lr": self.rate(0.0), "weight_decay": self.weight_decay, "fused": True}
        if self.optimizer == "sgd":
            return optim.SGD(parameters, momentum=self.momentum, nesterov=self.nesterov, **shared)
        return {"adam": optim.Adam, "adamw": optim.AdamW}[self.optimizer](parameters, **shared)


PAPER_WEIGHT_DECAY = {"vgg": 5e-4, "wrn": 5e-4, "resnet": 1e-4, "mobilenet": 1e-4}
"""By the beginning of a network's name; any other network takes 5e-4."""


def _paper(trains: Trains, network: str) -> Recipe:
    decay = next((d for prefix, d in PAPER_WEIGHT_DECAY.items() if network.startswith(prefix)), 5e-4)
    if trains == "exits":
        # The authors step their scheduler at the start of an epoch: 14 epochs at the first rate, not 15.
        return Recipe(epochs=25, optimizer="adam", lr=1e-3, weight_decay=decay, milestones=(14 / 25,))
    return Recipe(epochs=100, lr=0.1, weight_decay=decay, milestones=(0.34, 0.59, 0.84))


def _fast(trains: Trains, network: str) -> Recipe:
    fast = {"schedule": "one_cycle", "clip_norm": 5.0, "precision": "auto", "channels_last": True}
    if trains == "exits":
        return Recipe(epochs=10, optimizer="adamw", lr=3e-3, weight_decay=1e-2, **fast)
    # A peak of 0.4 diverged with seven losses in bf16; 0.2 with clipping trains.
    return Recipe(epochs=30, lr=0.2, nesterov=True, weight_decay=5e-4, **fast)


RECIPES = {"paper": _paper, "fast": _fast}


def named_recipe(name: str, trains: Trains, network: str = "") -> Recipe:
    """A recipe by name, for what a phase trains.

    Args:
        name: ``"paper"``: the authors' settings (sgd 0.1, divided by ten at 34, 59 and 84 % of 100 epochs;
            for exits alone adam 1e-3, at 56 % of 25). ``"fast"``: one cycle up to 0.2 and down, clipping,
            bf16 where the device has it, channels-last.
        trains: ``"backbone"``, ``"exits"`` or ``"all"``.
        network: its name; the authors' weight decay depends on it.

    Raises:
        UnknownName: there is no such recipe.

    Cite: Kaya, Hong & Dumitras, ICML 2019, and the authors' code for the exact milestones.
    """
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name](trains, network)
