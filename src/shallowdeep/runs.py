"""A run: its configuration, its folder, and the steps that fill it.

A run folder is the whole provenance of a number::

    config.json  environment.json  history.jsonl  sdn.safetensors  traces/  policy.json  results/
"""

from __future__ import annotations

import difflib
import os
import platform
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shallowdeep.data.images import Splits
from shallowdeep.data.sources import load_data
from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.networks.attach import SHARES, attach
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network
from shallowdeep.storage import load_tensors, read_json, write_json
from shallowdeep.traces.record import record
from shallowdeep.traces.trace import Trace
from shallowdeep.training.loop import fit
from shallowdeep.training.recipes import Recipe, Trains, named_recipe
from shallowdeep.training.strategies import named_strategy

TRAIN_TRACE_SIZE = 10_000  # images of the training split that are recorded, for confusion's mean and spread


class RecipeChoice(BaseModel):
    """A recipe by name, and what to change in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "fast"
    epochs: int | None = Field(default=None, gt=0, description="of each phase")
    batch_size: int | None = Field(default=None, gt=1)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] | None = None

    def build(self, trains: Trains, network: str) -> Recipe:
        """The recipe for what a phase trains."""
        changes = self.model_dump(exclude={"name"}, exclude_none=True)
        return Recipe(**{**named_recipe(self.name, trains, network).model_dump(), **changes})


class RunConfig(BaseModel):
    """Everything that decides a run's numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = "digits"
    data_dir: str | None = None
    val_size: int | None = Field(default=None, gt=0)
    network: str = "resnet20"
    image_size: int = 32
    shares: tuple[float, ...] = SHARES
    taps: tuple[str, ...] | None = None
    strategy: str = "joint"
    recipe: RecipeChoice = RecipeChoice()
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, gt=0, description="a CPU's sums depend on their number")
    init: str | None = Field(
        default=None, description="a run, or its sdn.safetensors, whose backbone weights to start from"
    )
    device: str = "auto"
    validate_every: int = Field(default=1, ge=0)


def load_config(
    file: str | os.PathLike[str] | None = None, changes: Mapping[str, Any] | None = None
) -> RunConfig:
    """A RunConfig from a TOML file and changes to it.

    Args:
        file: a TOML file whose keys are RunConfig's; ``None``: start from the defaults.
        changes: dotted key to value, e.g. ``{"recipe.lr": 0.05}``; they win over the file. Text is read
            as the field's type.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown (the nearest ones are named), or a
            value has the wrong type or range.

    >>> load_config(changes={"strategy": "plain", "recipe.epochs": "3"}).recipe.epochs
    3
    """
    values = {} if file is None else _read_toml(Path(file))
    for key, value in (changes or {}).items():
        *parents, leaf = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"unknown key '{key}': '{parent}' is no group of options.")
        place[leaf] = value
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read {path} as TOML: {error}") from None


def config_keys() -> list[str]:
    """All keys of a RunConfig, dotted."""
    nested = [f"recipe.{name}" for name in RecipeChoice.model_fields]
    return sorted([name for name in RunConfig.model_fields if name != "recipe"] + nested)


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, config_keys(), n=3)
        return f"unknown key '{key}'. " + (
            f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(config_keys())}"
        )
    return f"{key} = {problem['input']!r}: {problem['msg'].lower()}."


class Run:
    """A run folder: what is in it, and the steps that fill it.

    Args:
        folder: of the run; ``create`` makes it, the constructor only opens it.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        values = read_json(self.folder / "config.json")
        try:
            self.config = RunConfig.model_validate(values)
        except ValidationError as error:
            raise FileFormatError(f"{self.folder / 'config.json'}: {_explain(error)}") from None

    @classmethod
    def create(cls, folder: str | os.PathLike[str], config: RunConfig, *, resume: bool = False) -> Run:
        """Begin a run in a fresh folder, or go on with the same run.

        Raises:
            ConfigError: the folder holds a run already and ``resume`` is not set, or it is another run.
        """
        place = Path(folder)
        values = config.model_dump(mode="json")
        if (place / "config.json").exists():
            if not resume:
                raise ConfigError(
                    f"{place} holds a run already. Pass --resume to go on with it, or name another folder."
                )
            if read_json(place / "config.json") != values:
                raise ConfigError(f"{place} holds a run with another configuration. Name another folder.")
        elif place.exists() and any(place.iterdir()):
            raise ConfigError(f"{place} is neither empty nor a run. Name another folder.")
        write_json(place / "config.json", values)
        return cls(place)

    @property
    def weights(self) -> Path:
        """Where the trained network lies."""
        return self.folder / "sdn.safetensors"

    def load_data(self) -> Splits:
        """The run's data."""
        config = self.config
        return load_data(config.data, data_dir=config.data_dir, val_size=config.val_size)

    def build(self, data: Splits) -> ShallowDeepNetwork:
        """The run's network before training: fresh exits, and fresh or given backbone weights."""
        config = self.config
        if config.strategy == "ic_only" and config.init is None:
            raise ConfigError("ic_only trains the exits of a trained backbone. Give one: --init RUN")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            net = load_network(config.network, num_classes=data.num_classes, image_size=config.image_size)
            taps = () if config.strategy == "plain" else config.taps
            sdn = attach(net, data.example_inputs, shares=config.shares, taps=taps)
        if config.init is not None:
            _load_backbone(sdn, Path(config.init))
        return sdn

    def fit(self, *, resume: bool = False, progress: bool = True) -> ShallowDeepNetwork:
        """Train and save the network; one that is there already is only loaded."""
        if resume and self.weights.exists():
            return self.load()
        config = self.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        data = self.load_data()
        sdn = self.build(data)
        strategy = named_strategy(
            config.strategy, sdn, lambda trains: config.recipe.build(trains, config.network)
        )
        write_json(self.folder / "environment.json", describe_environment())
        fit(
            sdn,
            data,
            strategy=strategy,
            seed=config.seed,
            device=config.device,
            folder=self.folder,
            resume=resume,
            validate_every=config.validate_every,
            progress=progress,
        )
        sdn.save(self.weights)
        return sdn

    def load(self) -> ShallowDeepNetwork:
        """The trained network."""
        return ShallowDeepNetwork.load(self.weights)

    def record(
        self, splits: Iterable[str] = ("train", "val", "test"), *, progress: bool = True
    ) -> dict[str, Trace]:
        """Record splits into ``traces/``; of the training split, 10,000 images at most."""
        sdn, data = self.load(), self.load_data()
        if torch.cuda.is_available() and self.config.device != "cpu":
            sdn.to("cuda")
        traces = {}
        for split in splits:
            images = getattr(data, split)
            if split == "train" and len(images) > TRAIN_TRACE_SIZE:
                images = images.sample(TRAIN_TRACE_SIZE)
            traces[split] = record(sdn, images, strategy=self.config.strategy, progress=progress)
            traces[split].save(self.folder / "traces" / f"{split}.safetensors")
        return traces

    def trace(self, split: str) -> Trace:
        """A recorded split.

        Raises:
            FileFormatError: it is not recorded yet, or damaged.
        """
        path = self.folder / "traces" / f"{split}.safetensors"
        if not path.exists():
            raise FileFormatError(
                f"{self.folder} has no Trace of its {split} split. Make it: shallowdeep record {self.folder}"
            )
        return Trace.load(path)


def _load_backbone(sdn: ShallowDeepNetwork, path: Path) -> None:
    path = path / "sdn.safetensors" if path.is_dir() else path
    tensors, _ = load_tensors(path, kind="sdn")
    prefix = "backbone."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        sdn.backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise FileFormatError(
            f"the backbone in {path} is another network: {str(error).splitlines()[0]}"
        ) from None


def describe_environment() -> dict[str, Any]:
    """Hardware, versions and command: what a figure's reader needs to know."""
    return {
        "command": shlex.join(["shallowdeep", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("shallowdeep", "torch", "numpy", "lightning-fabric")},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
