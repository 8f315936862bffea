"""A run folder: what is in it, and where.

A run folder is the whole provenance of a number::

    config.json  environment.json  history.jsonl  sdn.safetensors  traces/  policy.json  results/

A precision other than fp32 answers otherwise, so it has Traces, a policy and results of its own, with its name behind
theirs: ``traces/val-int8.safetensors``, ``policy-int8.json``.
"""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from shallowdeep.analysis.together import Result
from shallowdeep.config import RunConfig, explain
from shallowdeep.data.samples import SPLITS, Splits
from shallowdeep.data.sources import load_data
from shallowdeep.data.text import TEXTS
from shallowdeep.errors import ConfigError, FileFormatError, UnknownName
from shallowdeep.inference.backends import PRECISIONS
from shallowdeep.networks.hub import WEIGHTS
from shallowdeep.networks.inputs import preprocessing_of
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import NetworkSpec
from shallowdeep.policies.rules import ExitPolicy, policy_from_dict
from shallowdeep.storage import making, read_json, write_json, write_text
from shallowdeep.traces.trace import Trace

RECORDED = (*SPLITS, "triggered")

Kind = TypeVar("Kind", bound="RunFolder")


class RunFolder:
    """A run folder: what is in it.

    Args:
        folder: of the run. ``open`` reads one that is there, ``create`` takes a fresh one.
        config: of the run.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder = folder
        self.config = config

    @classmethod
    def open(cls: type[Kind], folder: str | os.PathLike[str]) -> Kind:
        """A run that is there.

        Raises:
            FileFormatError: the folder holds no run, or its configuration is damaged.
        """
        place = Path(folder)
        values = read_json(place / "config.json")
        try:
            return cls(place, RunConfig.model_validate(values))
        except ValidationError as error:
            raise FileFormatError(f"{place / 'config.json'}: {explain(error)}") from None

    @classmethod
    def create(cls: type[Kind], folder: str | os.PathLike[str], config: RunConfig, *, resume: bool = False) -> Kind:
        """A run in a fresh folder, or the same run to go on with; nothing is written before ``fit``.

        Raises:
            ConfigError: the folder holds a run already and ``resume`` is not set, or it is another run.
        """
        place = Path(folder)
        if (place / "config.json").exists():
            if not resume:
                raise ConfigError(f"{place} holds a run already. Pass --resume to go on, or name another folder.")
            found, asked = cls.open(place).config.model_dump(), config.model_dump()
            others = [key for key in found if found[key] != asked[key]]
            if others:
                raise ConfigError(
                    f"{place} holds a run with another configuration ({', '.join(others)}). Name another folder, "
                    "or go on with that run by --resume without other options."
                )
        elif place.exists() and any(path.suffix not in (".partial", ".lock") for path in place.iterdir()):
            raise ConfigError(f"{place} is neither empty nor a run. Name another folder.")
        return cls(place, config)

    @property
    def weights(self) -> Path:
        """Where the trained network lies."""
        return self.folder / WEIGHTS

    @property
    def origins(self) -> tuple[RunConfig, ...]:
        """Configurations of the runs that the backbone's first weights come from, the nearest first.

        As far as they are known: ``init`` may name weights that are in no run, and runs of earlier versions did not
        keep them.
        """
        if not (self.folder / "config.json").exists():  # not begun
            return _origins_of(self.config.init)
        path = self.folder / "environment.json"
        environment = read_json(path) if path.exists() else None
        kept = environment.get("origins", ()) if isinstance(environment, dict) else ()
        try:
            return tuple(RunConfig.model_validate(values) for values in kept)
        except (ValidationError, TypeError):
            raise FileFormatError(f"{path} names origins that are no runs. Remove it to go on without it.") from None

    @property
    def prepares(self) -> bool:
        """Whether images are prepared as the network says: it came trained, here or in the run it first was in."""
        first = (self.config, *self.origins)[-1]
        return first.init is None and first.starts_trained

    def load_data(self, net: nn.Module | None = None) -> Splits:
        """The run's data; images prepared for ``net``, where that is given and the run ``prepares`` them."""
        config = self.config
        of_images = config.data not in ("digits", *TEXTS)
        prepared = preprocessing_of(net) if net is not None and of_images and self.prepares else None
        options = config.data_options.model_dump()
        return load_data(
            config.data, data_dir=config.data_dir, val_size=config.val_size, preprocessing=prepared, **options
        )

    def load(self) -> ShallowDeepNetwork:
        """The trained network, in evaluation mode.

        Where the run's configuration names a function that builds the network, that is called.

        Raises:
            FileFormatError: there is none yet, or its file is damaged.
        """
        self.check_trained()
        name = self.config.network
        return ShallowDeepNetwork.load(self.weights, trust_code=name if NetworkSpec(name).runs_code else False).eval()

    def check_trained(self) -> None:
        """Say what to do where the training has not come to its end.

        Raises:
            FileFormatError: the network is not there.
        """
        if self._unfinished:
            raise FileFormatError(f"{self.folder} {self._unfinished}")
        if not self.weights.exists():
            raise FileFormatError(f"{self.folder} holds no network, {self.weights.name}. Train it, or bring it back.")

    @property
    def _unfinished(self) -> str:
        """How far the training came and how it goes on; empty where it came to its end, or never began."""
        history = self.folder / "history.jsonl"
        if self.weights.exists() or not (self.folder / "checkpoint.pt").exists() or not history.exists():
            return ""
        done = len(history.read_bytes().splitlines())
        return (
            f"is not trained to its end ({done} {'epochs' if done > 1 else 'epoch'} done). Go on: "
            f"shallowdeep fit --out {quote(str(self.folder))} --resume"
        )

    def trace_file(self, split: str, precision: str) -> Path:
        """Where a split's Trace lies, or would."""
        return self.folder / "traces" / f"{split}{suffix(precision)}.safetensors"

    def policy_file(self, precision: str) -> Path:
        """Where a precision's policy lies, or would."""
        return self.folder / f"policy{suffix(precision)}.json"

    @property
    def benchmarks(self) -> list[Path]:
        """What ``bench`` wrote: a file for each device and choice of precisions."""
        return sorted((self.folder / "results").glob("bench*.json"))

    def trace(self, split: str, precision: str = "fp32") -> Trace:
        """A recorded split.

        Raises:
            UnknownName: there is no such split, or no such precision.
            FileFormatError: it is not recorded yet, or damaged.
        """
        check_split(split)
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        path = self.trace_file(split, precision)
        if split == "val" and self.config.val_size == 0:
            raise FileFormatError(
                f"{self.folder} held no images out (val_size=0), so there is nothing to choose a threshold on. "
                "Train with a validation split."
            )
        if not path.exists():
            others = sorted(file.stem for file in path.parent.glob("*.safetensors"))
            hint = f"Make it: shallowdeep record {quote(str(self.folder))}{option(precision)}"
            if self._unfinished:
                hint = f"It {self._unfinished}"
            elif others:
                hint += f", if the data has such a split; there are {', '.join(others)}"
            kind = "Trace" if precision == "fp32" else f"{precision} Trace"
            raise FileFormatError(f"{self.folder} has no {kind} of its {split} split. {hint}")
        return Trace.load(path)

    def policy(self, precision: str = "fp32") -> ExitPolicy:
        """The run's policy for a precision.

        Raises:
            UnknownName: there is no such precision.
            FileFormatError: none was chosen yet.
            ConfigError: none was chosen yet for a precision other than fp32, whose thresholds do not serve it.
        """
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        path = self.policy_file(precision)
        command = f"shallowdeep calibrate {quote(str(self.folder))}{option(precision)} --max-cost 0.5"
        if not path.exists() and precision != "fp32":
            raise ConfigError(
                f"{self.folder} has no policy for {precision}, which answers otherwise than fp32. Choose one: {command}"
            )
        if not path.exists():
            raise FileFormatError(f"{self.folder} has no policy. Choose one: {command}")
        return policy_from_dict(read_json(path))

    def archive(self, folder: str | os.PathLike[str]) -> None:
        """Copy the run, whole or not at all, to where it can be kept: in half precision, without checkpoint.

        Decisions replayed from half-precision logits may differ where a confidence lies within rounding of a
        threshold; ``results/`` is copied as it is. What half precision does not hold is kept as it is.

        Args:
            folder: fresh; the copy can be opened as a run.

        Raises:
            ConfigError: the folder is not fresh.
            FileFormatError: the run is not trained and recorded.
        """
        place = Path(folder)
        self.create(place, self.config)
        every = [(split, precision) for precision in PRECISIONS for split in RECORDED]
        recorded = [one for one in every if self.trace_file(*one).exists()]
        sdn = self.load()
        traces = {self.trace_file(*one).name: self.trace(*one) for one in recorded or [(one, "fp32") for one in SPLITS]}
        texts = ["config.json", "environment.json", "history.jsonl"]
        texts += [self.policy_file(precision).name for precision in PRECISIONS]
        texts += [f"results/{path.name}" for path in sorted((self.folder / "results").glob("*.json"))]
        with making(place) as partial:
            sdn.save(partial / self.weights.name, dtype=torch.float16)
            for name, trace in traces.items():
                held = max(logits.abs().max().item() for logits in trace.logits) <= torch.finfo(torch.float16).max
                trace.save(partial / "traces" / name, dtype=torch.float16 if held else None)
            for name in texts:
                if (self.folder / name).exists():
                    write_text(partial / name, (self.folder / name).read_text(encoding="utf-8"))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the network and a model card that says what the run knows of it; see ``ShallowDeepNetwork``.

        Where the test split is recorded, the card has the accuracy of every exit on it.
        """
        info: dict[str, Any] = {"data": self.config.data, "strategy": self.config.strategy}
        if (self.folder / "traces" / "test.safetensors").exists():
            test = self.trace("test")
            info |= {"accuracy": test.correct.double().mean(0).tolist(), "split": "test"}
        self.load().save_pretrained(folder, card_info=info)

    def write_result(self, name: str, result: Result, **more: Any) -> None:
        """Write a result to ``results/<name>.json``, with the configuration and environment it rests on."""
        environment = read_json(self.folder / "environment.json")
        values = {**more, **result.to_dict(), "config": self.config.model_dump(mode="json"), "environment": environment}
        write_json(self.folder / "results" / f"{name}.json", values)


def _origins_of(init: str | None) -> tuple[RunConfig, ...]:
    place = Path() if init is None else Path(init).parent if Path(init).name == WEIGHTS else Path(init)
    if init is None or not (place / "config.json").is_file():
        return ()
    run = RunFolder.open(place)
    return (run.config, *run.origins)


def check_split(split: str) -> None:
    """Say which splits can be recorded.

    Raises:
        UnknownName: this one cannot.
    """
    if split not in RECORDED:
        raise UnknownName("split", split, RECORDED)


def suffix(precision: str) -> str:
    """Behind the name of a file that belongs to a precision."""
    return "" if precision == "fp32" else f"-{precision}"


def option(precision: str) -> str:
    """Of a command that shall work in a precision."""
    return "" if precision == "fp32" else f" --precision {precision}"
