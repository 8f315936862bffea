"""A run: its configuration, its folder, and the steps that fill it.

A run folder is the whole provenance of a number::

    config.json  environment.json  history.jsonl  sdn.safetensors  traces/  policy.json  results/
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from shallowdeep.analysis.backdoor import measure_backdoor
from shallowdeep.analysis.budgets import cross_fit_budgets
from shallowdeep.analysis.together import Result, analyze_traces
from shallowdeep.config import RunConfig, explain
from shallowdeep.data.samples import SPLITS, IndexedSamples, Splits
from shallowdeep.data.sources import load_data
from shallowdeep.data.text import TEXTS
from shallowdeep.data.triggers import poison, stamp, triggered
from shallowdeep.errors import ConfigError, FileFormatError, UnknownName
from shallowdeep.inference.onnx.export import Export, export
from shallowdeep.networks.attach import attach
from shallowdeep.networks.backbones.weights import put_weights
from shallowdeep.networks.inputs import preprocessing_of
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import NetworkSpec, load_network
from shallowdeep.policies.calibrate import calibrate
from shallowdeep.policies.replay import Decisions, replay
from shallowdeep.policies.rules import ExitPolicy, policy_from_dict
from shallowdeep.processes import is_first, join, num_threads, wait_for_all
from shallowdeep.provenance import started
from shallowdeep.storage import load_tensors, making, read_json, sweep, write_json, write_text
from shallowdeep.traces.record import record
from shallowdeep.traces.trace import Trace
from shallowdeep.training.loop import fit
from shallowdeep.training.strategies import named_strategy

RECORDED = (*SPLITS, "triggered")
TRAIN_TRACE_SIZE = 10_000  # samples of the training split that are recorded, for confusion's mean and spread


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

    def load_data(self, net: nn.Module | None = None) -> Splits:
        """The run's data; images prepared for a network that comes trained, where that is given."""
        config = self.config
        options = {"data_dir": config.data_dir, "val_size": config.val_size, **config.data_options}
        prepared = None if net is None or config.init else preprocessing_of(net)
        of_images = config.data not in ("digits", *TEXTS)
        if prepared is not None and config.starts_trained and of_images:
            options["preprocessing"] = prepared
        return load_data(config.data, **options)

    def build(self, data: Splits) -> ShallowDeepNetwork:
        """The run's network before training: fresh exits, and fresh or given backbone weights."""
        config = self.config
        if config.strategy in ("ic_only", "distil") and not config.starts_trained:
            raise ConfigError(f"{config.strategy} trains the exits of a trained backbone. Give one: --init RUN")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            net = self.build_network(data)
            taps = () if config.strategy == "plain" else config.taps
            sdn = attach(net, data.example_inputs, shares=config.shares, taps=taps)
        if config.init is not None:
            _load_backbone(sdn, Path(config.init))
        return sdn

    def build_network(self, data: Splits) -> nn.Module:
        """The run's backbone, fresh or with the weights it comes with."""
        config = self.config
        size, side = config.image_size, _side(data.example_inputs)
        if size is not None and side is not None and size != side:
            raise ConfigError(
                f"the images have {side} pixels a side, the network is built for image_size={size}. "
                f"Set image_size={side}."
            )
        size = side if size is None and ":" not in config.network else size
        return load_network(config.network, num_classes=data.num_classes, image_size=size, **config.network_options)

    def fit(self, *, resume: bool = False, progress: bool = True) -> ShallowDeepNetwork:
        """Train and save the network; one that is there already is only loaded."""
        if resume and self.weights.exists():
            return self.load()
        config = self.config
        join(config.device, devices=config.devices, num_nodes=config.num_nodes)
        data = self._data_for_training()
        sdn = self.build(data)
        strategy = named_strategy(config.strategy, sdn, lambda trains: config.recipe.build(trains, config.network))
        with num_threads(config.threads), started(self.folder, config, data):
            fit(
                sdn,
                data,
                strategy=strategy,
                seed=config.seed,
                device=config.device,
                devices=config.devices,
                num_nodes=config.num_nodes,
                folder=self.folder,
                resume=resume,
                validate_every=config.validate_every,
                features=config.features,
                compile=config.compile,
                progress=progress,
            )
        if is_first():
            sdn.save(self.weights)
        wait_for_all()
        return sdn

    def _data_for_training(self) -> Splits:
        data = self.load_data()
        if self.config.starts_trained and ":" in self.config.network:
            data = self.load_data(self.build_network(data))  # only the network knows how its images are prepared
        backdoor = self.config.backdoor.build()
        if backdoor is None:
            return data
        # what recording would stumble over is said before the training
        stamp(data.train.subset(range(1)) if isinstance(data.train, IndexedSamples) else data.train, backdoor.stamp)
        backdoor.target_in(data.class_names)
        return replace(data, train=poison(data.train, backdoor)) if backdoor.rate else data

    def load(self) -> ShallowDeepNetwork:
        """The trained network, in evaluation mode.

        Where the run's configuration names a function that builds the network, that is called.
        """
        name = self.config.network
        return ShallowDeepNetwork.load(self.weights, trust_code=name if NetworkSpec(name).runs_code else False).eval()

    def record(self, splits: Iterable[str] | None = None, *, progress: bool = True) -> dict[str, Trace]:
        """Record splits (``None``: all there are) into ``traces/``.

        Of the training split, 10,000 samples at most, clean ones. Where the run has a backdoor, ``"triggered"`` is the
        test split with the stamp.
        """
        config = self.config
        join(config.device, devices=config.devices, num_nodes=config.num_nodes)
        sdn = self.load()
        data = self.load_data(sdn.backbone)
        if torch.cuda.is_available() and self.config.device != "cpu":
            sdn.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        if is_first():
            sweep(self.folder)
        traces = {}
        backdoor = config.backdoor.build()
        there = [split for split in SPLITS if getattr(data, split) is not None]
        for split in splits or [*there, *(["triggered"] if backdoor and data.test is not None else [])]:
            samples = (
                triggered(data.split("test"), backdoor) if backdoor and split == "triggered" else data.split(split)
            )
            if split == "train" and isinstance(samples, IndexedSamples) and len(samples) > TRAIN_TRACE_SIZE:
                samples = samples.sample(TRAIN_TRACE_SIZE)
            with num_threads(config.threads):
                traces[split] = record(sdn, samples, strategy=config.strategy, progress=progress)
            if is_first():
                traces[split].save(self.folder / "traces" / f"{split}.safetensors")
        wait_for_all()
        return traces

    def trace(self, split: str) -> Trace:
        """A recorded split.

        Raises:
            UnknownName: there is no such split.
            FileFormatError: it is not recorded yet, or damaged.
        """
        if split not in RECORDED:
            raise UnknownName("split", split, RECORDED)
        path = self.folder / "traces" / f"{split}.safetensors"
        if split == "val" and self.config.val_size == 0:
            raise FileFormatError(
                f"{self.folder} held no images out (val_size=0), so there is nothing to choose a threshold on. "
                "Train with a validation split."
            )
        if not path.exists():
            others = sorted(file.stem for file in path.parent.glob("*.safetensors"))
            hint = f"Make it: shallowdeep record {self.folder}"
            if others:
                hint += f", if the data has such a split; there are {', '.join(others)}"
            raise FileFormatError(f"{self.folder} has no Trace of its {split} split. {hint}")
        return Trace.load(path)

    def analyze(self) -> dict[str, Result]:
        """Every analysis of the recorded splits, also written to ``results/``."""
        test = self.trace("test")
        single = test.num_exits == 1
        held_out = self.config.val_size != 0
        val = self.trace("val") if held_out and not single else None
        found = analyze_traces(test, val, None if single else self.trace("train"))
        if not held_out and not single:
            found["budgets"] = cross_fit_budgets(test)
        backdoor = self.config.backdoor.build()
        if backdoor is not None and not single:
            policy = self.policy() if (self.folder / "policy.json").exists() else None
            target = backdoor.target_in(test.info.class_names)
            found["backdoor"] = measure_backdoor(
                test, self.trace("triggered"), target, training=self.trace("train"), policy=policy
            )
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
        decisions = replay(val, policy)
        asked = demand if original is None else {**demand, "original": str(original.folder)}
        self.write_result("calibration", decisions, policy=policy.to_dict(), demand=asked)
        write_json(self.folder / "policy.json", policy.to_dict())
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

    def export(
        self, folder: str | os.PathLike[str], *, precision: str = "fp32", uint8: bool = False, calibrate_on: int = 512
    ) -> Export:
        """Write the network and its policy as a folder that runs without PyTorch; see ``export``.

        Args:
            folder: not there yet, or empty.
            precision: ``"fp32"`` or ``"int8"``.
            uint8: the folder takes images as they are in files, and normalises them itself.
            calibrate_on: images of the validation split that int8 is calibrated on.
        """
        policy, sdn = self.policy(), self.load()
        data = self.load_data(sdn.backbone)
        split = data.split("val") if precision == "int8" else None
        return export(
            sdn,
            policy,
            Path(folder),
            example_inputs=data.example_inputs,
            precision=precision,
            preprocessing=data if uint8 else None,
            calibration=None if split is None else next(iter(split.batches(calibrate_on))).inputs,
            class_names=data.train.class_names,
        )

    def archive(self, folder: str | os.PathLike[str]) -> None:
        """Copy the run, whole or not at all, to where it can be kept: in half precision, without checkpoint.

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
        recorded = [split for split in RECORDED if (self.folder / "traces" / f"{split}.safetensors").exists()]
        sdn, traces = self.load(), {split: self.trace(split) for split in recorded or SPLITS}
        texts = ["config.json", "environment.json", "history.jsonl", "policy.json"]
        texts += [f"results/{path.name}" for path in sorted((self.folder / "results").glob("*.json"))]
        with making(place) as partial:
            sdn.save(partial / self.weights.name, dtype=torch.float16)
            for split, trace in traces.items():
                trace.save(partial / "traces" / f"{split}.safetensors", dtype=torch.float16)
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


def _side(inputs: Any) -> int | None:
    """Pixels a side of square images; ``None`` for other inputs."""
    return inputs.shape[-1] if isinstance(inputs, Tensor) and inputs.ndim == 4 else None


def _load_backbone(sdn: ShallowDeepNetwork, path: Path) -> None:
    path = path / "sdn.safetensors" if path.is_dir() else path
    tensors, _ = load_tensors(path, kind="sdn")
    prefix = "backbone."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    put_weights(sdn.backbone, weights, str(path))
