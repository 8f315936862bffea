"""A run's configuration: everything that decides its numbers, from TOML, from options, checked."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shallowdeep.data.triggers import Backdoor, Stamp
from shallowdeep.errors import ConfigError
from shallowdeep.networks.attach import SHARES
from shallowdeep.networks.zoo import NetworkSpec
from shallowdeep.storage import first_problem, parse_json, shown
from shallowdeep.training.features import FeatureReuse
from shallowdeep.training.recipes import Recipe, Share, Trains, named_recipe


class RecipeChoice(BaseModel):
    """A recipe by name, and what to change in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "fast"
    epochs: int | None = Field(default=None, gt=0, description="of each phase")
    batch_size: int | None = Field(default=None, gt=1)
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    lr: float | None = Field(default=None, gt=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    schedule: Literal["constant", "milestones", "one_cycle"] | None = None
    milestones: tuple[Share, ...] | None = None
    warmup: float | None = Field(default=None, gt=0, lt=1)
    clip_norm: float | None = Field(default=None, gt=0)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] | None = None
    channels_last: bool | None = None

    def build(self, trains: Trains, network: str) -> Recipe:
        """The recipe for what a phase trains.

        Raises:
            ConfigError: what is changed does not go with the rest of the recipe.
        """
        changes = self.model_dump(exclude={"name"}, exclude_none=True)
        try:
            return Recipe(**{**named_recipe(self.name, trains, network).model_dump(), **changes})
        except ValidationError as error:
            raise ConfigError(f"the recipe: {first_problem(error)}.") from None


class DataOptions(BaseModel):
    """What else ``load_data`` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: str = Field(default="fine", description="the data set's label set: fine or coarse")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the validation split")
    image_column: str | None = Field(default=None, description="of Parquet files of your own")
    label_column: str | None = Field(default=None, description="of Parquet files of your own")


class BackdoorChoice(BaseModel):
    """An attack that a run studies: some training images get a stamp and the target's label; see ``Backdoor``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: int | str | None = Field(
        default=None, description="class that stamped images are called; without one: none"
    )
    rate: float = Field(default=0.0, ge=0, lt=1, description="of all training images; 0: train on clean ones")
    seed: int = Field(default=0, ge=0, lt=2**63)
    side: int = Field(default=5, gt=0, description="of the stamp, a white square, in pixels")
    row: int = Field(default=26, ge=0)
    column: int = Field(default=26, ge=0)

    @model_validator(mode="after")
    def _has_a_target(self) -> BackdoorChoice:
        if self.rate and self.target is None:
            raise ValueError("a rate without a target poisons nothing: set backdoor.target")
        return self

    def build(self) -> Backdoor | None:
        """The attack, if there is a target."""
        if self.target is None:
            return None
        return Backdoor(self.target, self.rate, self.seed, Stamp(self.side, row=self.row, column=self.column))


class RunConfig(BaseModel):
    """Everything that decides a run's numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = "digits"
    data_dir: str | None = None
    data_options: DataOptions = DataOptions()
    val_size: int | None = Field(default=None, ge=0, description="0: none, train on all")
    backdoor: BackdoorChoice = BackdoorChoice()
    network: str = "resnet20"
    network_options: dict[str, Any] = Field(default={}, description="more of load_network, e.g. pretrained = true")
    image_size: int | None = Field(
        default=None, gt=0, description="in pixels; that of the data, or of a network that comes trained"
    )
    shares: tuple[float, ...] = SHARES
    taps: tuple[str, ...] | None = None
    strategy: str = "joint"
    recipe: RecipeChoice = RecipeChoice()
    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: int | None = Field(default=None, gt=0, le=1024, description="a CPU's sums depend on their number")
    init: str | None = Field(
        default=None, description="a run, or its sdn.safetensors, whose backbone weights to start from"
    )
    device: str = "auto"
    devices: int | None = Field(default=None, gt=0, description="processes a machine; those of torchrun, else one")
    num_nodes: int = Field(default=1, gt=0, description="machines")
    validate_every: int = Field(default=1, ge=0)
    features: FeatureReuse = FeatureReuse()
    compile: bool = Field(default=False, description="the training step's network, by PyTorch's compiler")

    @model_validator(mode="before")
    @classmethod
    def _as_earlier(cls, values: Any) -> Any:
        """Configurations of earlier versions may have two of the run's own options among those of its data."""
        options = values.get("data_options") if isinstance(values, dict) else None
        if not isinstance(options, dict):
            return values
        moved = {name: options[name] for name in ("val_size", "data_dir") if name in options}
        return {**values, "data_options": {k: v for k, v in options.items() if k not in moved}, **moved}

    @field_validator("network_options")
    @classmethod
    def _are_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in options:
            raise ValueError("the number of classes is the data's: leave num_classes out")
        if "image_size" in options:
            raise ValueError("the image size is an option of the run: set image_size")
        return options

    @property
    def starts_trained(self) -> bool:
        """Whether the backbone has weights that somebody trained, before this run; a function's are taken for it."""
        options = self.network_options
        fetched = self.network.startswith("hf:") and ("/" in self.network or Path(self.network[3:]).is_dir())
        chosen = options.get("pretrained", fetched) or options.get("weights")
        return bool(self.init or chosen or NetworkSpec(self.network).runs_code)


def load_config(file: str | os.PathLike[str] | None = None, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a TOML file and changes to it.

    Args:
        file: a TOML file whose keys are RunConfig's; ``None``: start from the defaults.
        changes: dotted key to value, e.g. ``{"recipe.lr": 0.05}``; they win over the file. Text is read
            as TOML where it is TOML, and as the field's type.

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
                raise ConfigError(f"unknown key {shown(key)}: {shown(parent)} is no group of options.")
        place[leaf] = parse_value(value) if isinstance(value, str) else value
    try:
        config = RunConfig.model_validate(values)
        _check_kept(config)
        return config
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _check_kept(config: RunConfig) -> None:
    """Refuse what a run folder's config.json would not give back: dates, numbers that are none, words of no script."""
    try:
        text = json.dumps(config.model_dump(mode="json"), ensure_ascii=False).encode()
        same, why = RunConfig.model_validate(parse_json(text.decode())) == config, "a value comes back as another"
    except (ValueError, RecursionError) as error:
        same, why = False, str(error)
    if not same:
        raise ConfigError(f"the options cannot be kept as JSON ({why}). Change network_options.")


def parse_value(text: str) -> Any:
    """A value as TOML has it; text that is not one TOML value stays text."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # TOML's own errors, a number of too many digits, or nested too deeply
        return text
    return found["value"] if len(found) == 1 else text


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}") from None
    except (ValueError, RecursionError, OSError) as error:  # TOML's own, no text, too many digits, nested too deeply
        raise ConfigError(f"cannot read {path} as TOML: {error}") from None


def config_keys() -> list[str]:
    """All keys of a RunConfig, dotted."""
    groups: dict[str, type[BaseModel]] = {
        "recipe": RecipeChoice,
        "data_options": DataOptions,
        "features": FeatureReuse,
        "backdoor": BackdoorChoice,
    }
    nested = [f"{group}.{name}" for group, model in groups.items() for name in model.model_fields]
    return sorted([name for name in RunConfig.model_fields if name not in groups] + nested)


def explain(error: ValidationError) -> str:
    """The first problem of a configuration in one line, with the nearest names for an unknown key."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, config_keys(), n=3)
        return f"unknown key {shown(key)}. " + (
            f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(config_keys())}"
        )
    return f"{first_problem(error)}."
