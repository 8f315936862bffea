"""The steps that fill a run folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.analysis.backdoor import measure_backdoor
from shallowdeep.analysis.budgets import cross_fit_budgets
from shallowdeep.analysis.together import Result, analyze_traces
from shallowdeep.data.samples import SPLITS, IndexedSamples, Splits
from shallowdeep.data.triggers import poison, stamp, triggered
from shallowdeep.errors import ConfigError, DataError, MissingExtra, UnknownName
from shallowdeep.inference.backends import PRECISIONS
from shallowdeep.inference.engine import Engine
from shallowdeep.inference.onnx.convert import OPSET
from shallowdeep.inference.onnx.export import Export, export
from shallowdeep.inference.timing.bench import DEFAULT_BACKENDS, first_samples, measure_speed, rows_of, sharing_threads
from shallowdeep.inference.timing.speed import SpeedReport
from shallowdeep.networks.attach import attach
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network
from shallowdeep.policies.calibrate import calibrate
from shallowdeep.policies.replay import Decisions, replay
from shallowdeep.policies.rules import Confidence, ExitPolicy
from shallowdeep.processes import is_first, join, make_fabric, num_threads, wait_for_all
from shallowdeep.provenance import describe_environment, started, trained_here
from shallowdeep.runs.folder import RunFolder, check_split, suffix
from shallowdeep.runs.origins import check_frozen, check_held_out, load_backbone
from shallowdeep.storage import sweep, write_json
from shallowdeep.traces.record import record
from shallowdeep.traces.trace import Trace
from shallowdeep.training.loop import fit
from shallowdeep.training.strategies import named_strategy

TRAIN_TRACE_SIZE = 10_000  # samples of the training split that are recorded, for confusion's mean and spread
CALIBRATION_SIZE = 512  # validation samples on which int8 is calibrated, wherever that is done
RECORDERS = {"bf16": "eager", "int8": "onnx"}  # back ends that record a Trace in another precision than fp32


class Run(RunFolder):
    """A run: its folder, and the steps that fill it."""

    def build(self, data: Splits) -> ShallowDeepNetwork:
        """The run's network before training: fresh exits, and fresh or given backbone weights."""
        config = self.config
        if config.strategy in ("ic_only", "distil") and not config.starts_trained:
            raise ConfigError(f"{config.strategy} trains the exits of a trained backbone. Give one: --init RUN")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            net = self.build_network(data)
            taps = () if config.strategy == "plain" else config.taps
            check_frozen(config, net, data)
            sdn = attach(net, data.example_inputs, shares=config.shares, taps=taps)
        if config.init is not None:
            load_backbone(sdn, Path(config.init), prepared=self.prepares)
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
        """Train and save the network; with ``resume``, one that is there already is only loaded.

        Raises:
            ConfigError: another process trains in this folder, or the configuration does not fit together.
        """
        if resume and self.weights.exists():
            return self.load()
        config = self.config
        join(config.device, devices=config.devices, num_nodes=config.num_nodes)
        with trained_here(self.folder):
            data = self._data_for_training()
            sdn = self.build(data)
            strategy = named_strategy(config.strategy, sdn, lambda trains: config.recipe.build(trains, config.network))
            with num_threads(config.threads), started(self.folder, config, data, self.origins):
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
        if self.prepares and ":" in self.config.network:
            data = self.load_data(self.build_network(data))  # only the network knows how its images are prepared
        check_held_out(self, data)
        backdoor = self.config.backdoor.build()
        if backdoor is None:
            return data
        # what recording would stumble over is said before the training
        stamp(data.train.subset(range(1)) if isinstance(data.train, IndexedSamples) else data.train, backdoor.stamp)
        backdoor.target_in(data.class_names)
        return replace(data, train=poison(data.train, backdoor)) if backdoor.rate else data

    def record(
        self, splits: Iterable[str] | None = None, *, precision: str = "fp32", progress: bool = True
    ) -> dict[str, Trace]:
        """Record splits (``None``: all there are) into ``traces/``.

        Of the training split, 10,000 samples at most, clean ones. Where the run has a backdoor, ``"triggered"`` is the
        test split with the stamp.

        Args:
            splits: by name.
            precision: of weights and arithmetic. ``"int8"`` is quantised for samples that stop where its own policy
                lets them, before one is chosen where that of fp32 does, and runs in ONNX Runtime on the CPU.
            progress: draw a bar on the terminal.
        """
        config = self.config
        stop = None if precision == "fp32" else self._stopping(precision)
        join(config.device, devices=config.devices, num_nodes=config.num_nodes)
        sdn = self.load()
        data = self.load_data(sdn.backbone)
        if torch.cuda.is_available() and self.config.device != "cpu" and precision != "int8":
            sdn.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        engine = None if stop is None else self._engine(sdn, stop, precision, data)
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
                if engine is None:
                    traces[split] = record(sdn, samples, strategy=config.strategy, progress=progress)
                else:
                    found = engine.record(samples, progress=progress)
                    traces[split] = replace(found, info=replace(found.info, strategy=config.strategy))
            if is_first():
                traces[split].save(self.trace_file(split, precision))
        wait_for_all()
        return traces

    def _stopping(self, precision: str) -> ExitPolicy:
        """Where samples stop while a precision is recorded, which int8 is calibrated by; all exits are looked at.

        Of int8 its own policy, or that of fp32 before one is chosen; bf16 is the same whoever stops.
        """
        if precision not in RECORDERS:
            raise UnknownName("precision", precision, PRECISIONS)
        if precision == "bf16":
            return Confidence(1.0)
        policy = self.policy(precision if self.policy_file(precision).exists() else "fp32")
        return replace(policy, exits=None)  # type: ignore[type-var]

    def _engine(self, sdn: ShallowDeepNetwork, policy: ExitPolicy, precision: str, data: Splits) -> Engine:
        """What records in a precision."""
        calibration = self._calibration_inputs(data) if precision == "int8" else None
        return Engine(sdn, policy, backend=RECORDERS[precision], precision=precision, calibration=calibration)

    def _calibration_inputs(self, data: Splits) -> Any:
        """What int8 is calibrated on: the same samples for its Trace, its export and its benchmark."""
        return first_samples(data.split("val"), CALIBRATION_SIZE).inputs

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

    def calibrate(self, *, precision: str = "fp32", original: Run | None = None, **demand: Any) -> Decisions:
        """Choose the run's policy on its validation split and write it to ``policy.json``, or ``policy-int8.json``.

        Args:
            precision: of weights and arithmetic. One other than fp32 gets a policy of its own, chosen on a Trace of
                its own, which is recorded where there is none.
            original: the run of the plain network, where the drop is measured from it.
            **demand: as for ``calibrate``.

        Returns:
            What the policy does on the validation split.
        """
        val = self._validation(precision)
        plain = None if original is None else original.trace("val")
        kept = demand.get("reference") == "original" and val.info.strategy == "ic_only"
        if original is None and precision != "fp32" and kept:
            plain = self.trace("val")  # in fp32 its last exit is the original network
        policy = calibrate(val, original=plain, **demand)
        decisions = replay(val, policy)
        asked = demand if original is None else {**demand, "original": str(original.folder)}
        self.write_result(
            f"calibration{suffix(precision)}", decisions, policy=policy.to_dict(), precision=precision, demand=asked
        )
        write_json(self.policy_file(precision), policy.to_dict())
        return decisions

    def _validation(self, precision: str) -> Trace:
        """The validation split's Trace; of a precision other than fp32, recorded now where it is not there."""
        if precision in RECORDERS and self.config.val_size != 0 and not self.trace_file("val", precision).exists():
            return self.record(["val"], precision=precision)["val"]
        return self.trace("val", precision)

    def replay(self, split: str = "test", *, precision: str = "fp32") -> Decisions:
        """What the run's policy does on a recorded split, also written to ``results/``."""
        check_split(split)
        policy = self.policy(precision)
        decisions = replay(self.trace(split, precision), policy)
        name = ("replay" if split == "test" else f"replay_{split}") + suffix(precision)
        self.write_result(name, decisions, split=split, precision=precision, policy=policy.to_dict())
        return decisions

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        precision: str = "fp32",
        uint8: bool = False,
        stages_only: bool = False,
        opset: int = OPSET,
    ) -> Export:
        """Write the network and its policy as a folder that runs without PyTorch; see ``export``.

        Args:
            folder: not there yet, or empty.
            precision: ``"fp32"`` or ``"int8"``, with the policy that was chosen for it. int8 is calibrated on
                ``CALIBRATION_SIZE`` images of the validation split.
            uint8: the folder takes images as they are in files, and normalises them itself.
            stages_only: leave out the files that leave by themselves.
            opset: of ONNX operators.
        """
        policy, sdn = self.policy(precision), self.load()
        data = self.load_data(sdn.backbone)
        return export(
            sdn,
            policy,
            Path(folder),
            example_inputs=data.example_inputs,
            precision=precision,
            preprocessing=data if uint8 else None,
            calibration=self._calibration_inputs(data) if precision == "int8" else None,
            single=not stages_only,
            batched=not stages_only,
            opset=opset,
            class_names=data.train.class_names,
        )

    def bench(
        self,
        *,
        batch_sizes: Sequence[int] = (1, 8, 32, 256),
        backends: Sequence[str] = DEFAULT_BACKENDS,
        precisions: Sequence[str] = ("fp32",),
        num_samples: int = 2000,
        rounds: int = 10,
        device: str = "auto",
        threads: int | None = None,
        smaller: bool = True,
        shared_pool: bool = False,
        progress: bool = False,
    ) -> SpeedReport:
        """Time early exits on the test split against the same network without them; see ``measure_speed``.

        Each precision stops by its own policy. Times, their ratios and a plot go to ``results/``, under the report's
        ``name``.

        Args:
            batch_sizes: samples in a batch.
            backends: of the engine.
            precisions: of weights and arithmetic.
            num_samples: of the test split, at most.
            rounds: times that each figure is taken.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or another that Fabric knows.
            threads: of the CPU; ``None``: as many as PyTorch has now.
            smaller: also time the networks that end at one exit.
            shared_pool: every session of ONNX Runtime in this process shares one pool of threads, from now on.
            progress: draw a bar on the terminal.

        Raises:
            ConfigError: an option is not usable, or a precision has no policy.
            DataError: the test split has no labels.
        """
        policies = {one: self.policy(one) for one in dict.fromkeys(["fp32", *precisions])}
        options = sharing_threads(precisions) if shared_pool else None
        place = make_fabric(device).device
        sdn = self.load().to(place)
        data = self.load_data(sdn.backbone).to(place)
        test = first_samples(data.split("test"), num_samples)
        if test.labels is None:
            raise DataError("a benchmark counts right answers, and the test split has no labels.")
        recorded = self.trace_file("test", "fp32").exists()
        report = measure_speed(
            sdn,
            policies,
            test.inputs,
            test.labels,
            batch_sizes=batch_sizes,
            backends=backends,
            precisions=precisions,
            rounds=rounds,
            threads=threads,
            smaller=smaller,
            trace=rows_of(self.trace("test"), test.ids) if recorded else None,
            calibration=self._calibration_inputs(data) if "int8" in precisions else None,
            options=options,
            progress=progress,
        )
        measured_on = {**describe_environment(data, report.device), "threads": report.threads}
        self.write_result(report.name, report, split="test", shared_pool=shared_pool, measured_on=measured_on)
        try:
            report.plot(self.folder / "results" / f"{report.name}.png")
        except MissingExtra as error:
            warnings.warn(f"no plot is drawn: {error}", stacklevel=2)
        return report


def _side(inputs: Any) -> int | None:
    """Pixels a side of square images; ``None`` for other inputs."""
    return inputs.shape[-1] if isinstance(inputs, Tensor) and inputs.ndim == 4 else None
