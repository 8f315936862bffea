"""A run: its configuration, its folder, and the steps that fill it.

A run folder is the whole provenance of a number::

    config.json  environment.json  history.jsonl  sdn.safetensors  traces/  policy.json  results/
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import ValidationError

from shallowdeep.analysis.budgets import measure_budgets
from shallowdeep.analysis.confusion import measure_confusion
from shallowdeep.analysis.overthinking import measure_overthinking
from shallowdeep.config import RunConfig, explain
from shallowdeep.data.images import SPLITS, Splits
from shallowdeep.data.sources import load_data
from shallowdeep.errors import ConfigError, FileFormatError, TraceError, UnknownName
from shallowdeep.networks.attach import attach
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network
from shallowdeep.policies.calibrate import calibrate
from shallowdeep.policies.replay import Decisions, replay
from shallowdeep.policies.rules import ExitPolicy, policy_from_dict
from shallowdeep.storage import load_tensors, read_json, write_json, write_text
from shallowdeep.traces.record import record
from shallowdeep.traces.trace import Trace
from shallowdeep.training.loop import fit
from shallowdeep.training.strategies import named_strategy

TRAIN_TRACE_SIZE = 10_000  # images of the training split that are recorded, for confusion's mean and spread


class Run:
    """A run folder: what is in it, and the steps that fill it.

    Args:
        folder: of the run. ``open`` reads one that is there, ``create`` takes a fresh one.
        config: of the run.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder = folder
        self.config = config

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
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
    def create(cls, folder: str | os.PathLike[str], config: RunConfig, *, resume: bool = False) -> Run:
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
        elif place.exists() and any(path.suffix != ".partial" for path in place.iterdir()):
            raise ConfigError(f"{place} is neither empty nor a run. Name another folder.")
        return cls(place, config)

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
        side = data.example_inputs.shape[-1]
        if config.image_size != side:
            raise ConfigError(
                f"the images have {side} pixels a side, the network is built for image_size={config.image_size}. "
                f"Set image_size={side}."
            )
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
        data = self.load_data()
        sdn = self.build(data)
        strategy = named_strategy(config.strategy, sdn, lambda trains: config.recipe.build(trains, config.network))
        with self._begun(data), _threads(config.threads):
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

    @contextmanager
    def _begun(self, data: Splits) -> Iterator[None]:
        """Write what the run is; where not even one epoch comes of it, leave no trace of it."""
        notes = self.folder / "config.json", self.folder / "environment.json"
        write_json(notes[0], self.config.model_dump(mode="json"))
        with _threads(self.config.threads):
            environment = describe_environment(data, self.config.device)
        if notes[1].exists():
            before = read_json(notes[1])
            environment["earlier"] = [*before.pop("earlier", []), before]
        write_json(notes[1], environment)
        try:
            yield
        except Exception:
            if not (self.folder / "checkpoint.pt").exists():
                for note in notes:
                    note.unlink()
                if not any(self.folder.iterdir()):
                    self.folder.rmdir()
            raise

    def load(self) -> ShallowDeepNetwork:
        """The trained network, in evaluation mode."""
        return ShallowDeepNetwork.load(self.weights).eval()

    def record(self, splits: Iterable[str] = ("train", "val", "test"), *, progress: bool = True) -> dict[str, Trace]:
        """Record splits into ``traces/``; of the training split, 10,000 images at most."""
        sdn, data = self.load(), self.load_data()
        if torch.cuda.is_available() and self.config.device != "cpu":
            sdn.to("cuda")
        traces = {}
        for split in splits:
            images = getattr(data, split)
            if split == "train" and len(images) > TRAIN_TRACE_SIZE:
                images = images.sample(TRAIN_TRACE_SIZE)
            with _threads(self.config.threads):
                traces[split] = record(sdn, images, strategy=self.config.strategy, progress=progress)
            traces[split].save(self.folder / "traces" / f"{split}.safetensors")
        return traces

    def trace(self, split: str) -> Trace:
        """A recorded split.

        Raises:
            UnknownName: there is no such split.
            FileFormatError: it is not recorded yet, or damaged.
        """
        if split not in SPLITS:
            raise UnknownName("split", split, SPLITS)
        path = self.folder / "traces" / f"{split}.safetensors"
        if not path.exists():
            command = f"shallowdeep record {self.folder}"
            raise FileFormatError(f"{self.folder} has no Trace of its {split} split. Make it: {command}")
        return Trace.load(path)

    def analyze(self) -> dict[str, Result]:
        """Every analysis of the recorded splits, also written to ``results/``."""
        test = self.trace("test")
        found: dict[str, Result] = {"overthinking": measure_overthinking(test)}
        if test.num_exits > 1:
            found["budgets"] = measure_budgets(self.trace("val"), test)
            try:
                found["confusion"] = measure_confusion(test, self.trace("train"))
            except TraceError as error:  # a network without errors is no reason to lose the rest
                warnings.warn(f"confusion is not measured: {error}", stacklevel=2)
        for name, result in found.items():
            self.write_result(name, result)
        return found

    def calibrate(self, *, original: Run | None = None, **demand: Any) -> Decisions:
        """Choose the run's policy on its validation split and write it to ``policy.json``.

        Args:
            original: the run of the plain network, where the drop is measured from it.
            **demand: as for ``calibrate``.

        Returns:
            What the policy does on the validation split.
        """
        val = self.trace("val")
        policy = calibrate(val, original=None if original is None else original.trace("val"), **demand)
        write_json(self.folder / "policy.json", policy.to_dict())
        decisions = replay(val, policy)
        self.write_result("calibration", decisions, policy=policy.to_dict())
        return decisions

    def policy(self) -> ExitPolicy:
        """The run's policy.

        Raises:
            FileFormatError: none was chosen yet.
        """
        path = self.folder / "policy.json"
        if not path.exists():
            command = f"shallowdeep calibrate {self.folder} --max-cost 0.5"
            raise FileFormatError(f"{self.folder} has no policy. Choose one: {command}")
        return policy_from_dict(read_json(path))

    def replay(self, split: str = "test") -> Decisions:
        """What the run's policy does on a recorded split, also written to ``results/``."""
        decisions = replay(self.trace(split), self.policy())
        self.write_result(
            "replay" if split == "test" else f"replay_{split}", decisions, split=split, policy=self.policy().to_dict()
        )
        return decisions

    def archive(self, folder: str | os.PathLike[str]) -> None:
        """Copy the run to where it can be kept: weights and Traces in half precision, no checkpoint.

        Decisions replayed from half-precision logits may differ where a confidence lies within rounding of a
        threshold; ``results/`` is copied as it is.

        Args:
            folder: fresh; the copy can be opened as a run.

        Raises:
            ConfigError: the folder is not fresh.
            FileFormatError: the run is not trained and recorded.
        """
        place = Path(folder)
        Run.create(place, self.config)
        sdn, traces = self.load(), {split: self.trace(split) for split in SPLITS}
        sdn.save(place / self.weights.name, dtype=torch.float16)
        for split, trace in traces.items():
            trace.save(place / "traces" / f"{split}.safetensors", dtype=torch.float16)
        texts = ["config.json", "environment.json", "history.jsonl", "policy.json"]
        texts += [f"results/{path.name}" for path in sorted((self.folder / "results").glob("*.json"))]
        for name in texts:
            if (self.folder / name).exists():
                write_text(place / name, (self.folder / name).read_text(encoding="utf-8"))

    def write_result(self, name: str, result: Result, **more: Any) -> None:
        """Write a result to ``results/<name>.json``, with the configuration and environment it rests on."""
        environment = read_json(self.folder / "environment.json")
        values = {**more, **result.to_dict(), "config": self.config.model_dump(mode="json"), "environment": environment}
        write_json(self.folder / "results" / f"{name}.json", values)


@runtime_checkable
class Result(Protocol):
    """What every analysis returns."""

    def rows(self) -> list[dict[str, Any]]:
        """As a table."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        ...


def _load_backbone(sdn: ShallowDeepNetwork, path: Path) -> None:
    path = path / "sdn.safetensors" if path.is_dir() else path
    tensors, _ = load_tensors(path, kind="sdn")
    prefix = "backbone."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        sdn.backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise FileFormatError(f"the backbone in {path} is another network: {str(error).splitlines()[0]}") from None


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads on the CPU; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_environment(data: Splits, device: str) -> dict[str, Any]:
    """Hardware, versions, data and command: what a figure's reader needs to know."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": _revision(),
        "data_md5": {split: getattr(data, split).md5() for split in SPLITS},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("shallowdeep", "torch", "numpy", "lightning-fabric")},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None,
    }


def _revision() -> str | None:
    """The commit of the checkout this package runs from, if it does."""
    git, root = shutil.which("git"), Path(__file__).parents[2]
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
