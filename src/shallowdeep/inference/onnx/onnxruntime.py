"""The exported stages in ONNX Runtime, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from shallowdeep.errors import ConfigError, require
from shallowdeep.inference.answers import Answers
from shallowdeep.inference.backends import MICRO_BATCH, Order
from shallowdeep.inference.cascade import Cascade, Values
from shallowdeep.inference.onnx.fold import NESTING, PLAN, StageModel, fold
from shallowdeep.inference.onnx.precisions import laid_out, models_for
from shallowdeep.inference.runner.sessions import Provider, RunnerError, Settings
from shallowdeep.inference.runner.stages import OneFile, OnnxStages, typed_thresholds
from shallowdeep.inference.stages import thresholds_of

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""What computes where a network is, by kind of device."""
MOST_BYTES = 2**28  # of stages that are held as one file as well


@dataclass(frozen=True)
class Folded:
    """All stages in one self-exiting file, in this process.

    Args:
        models: the stages, shallow to deep.
        exits: index of the exit that each ends at.
        costs: of leaving there.
        thresholds: the policy's numbers by name.
        settings: of ONNX Runtime.
    """

    models: Sequence[StageModel]
    exits: Sequence[int]
    costs: Sequence[float]
    thresholds: Mapping[str, float | int]
    settings: Settings

    def answer(self, inputs: Values, plan: np.ndarray | None) -> Answers:
        """Answer a batch in one run."""
        if plan is None:
            return self.by_policy.answer(inputs)
        return self.by_plan.answer({**inputs, PLAN: plan.astype(np.int64)})

    @cached_property
    def by_policy(self) -> OneFile:
        """Samples leave where the policy says so."""
        return self._open(planned=False)

    @cached_property
    def by_plan(self) -> OneFile:
        """Samples leave where they are told to; opened when it is first asked for, by those who time engines."""
        return self._open(planned=True)

    def _open(self, *, planned: bool) -> OneFile:
        model = fold(self.models, list(self.thresholds), batched=True, planned=planned)
        session = self.settings.open(model.SerializeToString(), "the stages as one file")
        return OneFile(session, self.exits, self.costs, typed_thresholds(session, self.thresholds))


@dataclass(frozen=True)
class OnnxCascade(Cascade):
    """Stages in ONNX Runtime; a batch that is run at once goes through all of them as one file, where there is one.

    ONNX Runtime's threads sleep between two runs, as beside a guest they should: stages run one by one wake them each
    time, one file once. Streams, answers at any time and larger batches take the stages.
    """

    folded: Folded | None = None

    def answer(self, inputs: Values, *, plan: np.ndarray | None = None) -> Answers:
        """See ``Cascade.answer``."""
        rows = len(next(iter(inputs.values())))
        if self.folded is None or self._most(rows) < rows:
            return super().answer(inputs, plan=plan)
        return self.folded.answer(inputs, plan)


def provider_for(device: torch.device, available: Sequence[str]) -> Provider:
    """What computes in ONNX Runtime on a network's device.

    Args:
        device: the network's.
        available: the providers that this onnxruntime has.

    Returns:
        Its name, on a GPU with that GPU's number.

    Raises:
        ConfigError: there is none.
    """
    name = PROVIDERS.get(device.type, "")
    if name not in available:
        wanted = f"{name}, which comes with onnxruntime-gpu" if name else "a provider named by providers="
        install = "Install onnxruntime-gpu in the place of onnxruntime" if name else "Name one"
        raise ConfigError(
            f"backend='onnx' on {device} needs {wanted}; this onnxruntime has {', '.join(available)}. "
            f'{install}, or compute on the CPU: sdn.to("cpu").'
        )
    return name if device.type == "cpu" else (name, {"device_id": device.index or 0})


def build_onnx(order: Order) -> OnnxCascade:
    """Stages in ONNX Runtime, in this process.

    Options: ``threads`` (``None``: as many as PyTorch uses), ``providers`` (``None``: the one of the network's device),
    ``spinning``, ``shared_pool`` (see ``runner.sessions.Settings``), ``one_file`` (hold the stages as one file as well;
    ``None``: on a CPU, where they nest and have at most ``MOST_BYTES``), and for int8 ``weight_bits`` (see
    ``quantize_stages``).

    Raises:
        ConfigError: this onnxruntime has no provider for the network's device, or not the one asked for.
        NetworkError: the network has no ONNX form, or none in this precision.
    """
    onnxruntime = require("onnxruntime", extra="onnx")
    options = order.take_options("threads", "providers", "spinning", "shared_pool", "one_file", "weight_bits")
    providers = options.pop("providers", None)
    if providers is None:
        providers = [provider_for(order.device, onnxruntime.get_available_providers())]
    options["providers"] = tuple(providers)
    models, policy = models_for(order, order.calibration, options.pop("weight_bits", None))
    models = laid_out(models, order.precision)
    threads, one_file = options.pop("threads", None), options.pop("one_file", None)
    settings = Settings(
        threads=torch.get_num_threads() if threads is None else threads,
        device_id=order.device.index or 0,  # for a GPU's provider asked for by name alone
        **options,
    )
    files = [model.model.SerializeToString() for model in models]
    numbers = thresholds_of(policy)
    if one_file is None:
        # Only a CPU's ``If`` is known to leave out what is not asked for.
        alone = settings.providers == (PROVIDERS["cpu"],) and 1 < len(models) <= NESTING
        one_file = alone and sum(map(len, files)) <= MOST_BYTES
    try:
        stages = OnnxStages(files, order.exits, numbers, settings)
        folded = Folded(models, order.exits, order.costs, numbers, settings) if one_file else None
        if folded is not None:
            folded.by_policy  # opened now  # noqa: B018
    except RunnerError as error:
        raise ConfigError(f"backend='onnx': {error}") from error
    return OnnxCascade(stages, order.costs, micro_batch=order.micro_batch or MICRO_BATCH, folded=folded)
