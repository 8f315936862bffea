"""The exported stages in ONNX Runtime, in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shallowdeep.errors import ConfigError, require
from shallowdeep.inference.backends import MICRO_BATCH, Order
from shallowdeep.inference.cascade import Cascade
from shallowdeep.inference.onnx.precisions import models_for
from shallowdeep.inference.runner.sessions import Provider, RunnerError, Settings
from shallowdeep.inference.runner.stages import OnnxStages
from shallowdeep.inference.stages import thresholds_of

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""What computes where a network is, by kind of device."""


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


def build_onnx(order: Order) -> Cascade:
    """Stages in ONNX Runtime, in this process.

    Options: ``threads`` (``None``: as many as PyTorch uses), ``providers`` (``None``: the one of the network's device),
    ``spinning``, ``shared_pool`` (see ``runner.sessions.Settings``), and for int8 ``weight_bits`` (see
    ``quantize_stages``).

    Raises:
        ConfigError: this onnxruntime has no provider for the network's device, or not the one asked for.
        NetworkError: the network has no ONNX form, or none in this precision.
    """
    onnxruntime = require("onnxruntime", extra="onnx")
    options = order.take_options("threads", "providers", "spinning", "shared_pool", "weight_bits")
    providers = options.pop("providers", None)
    if providers is None:
        providers = [provider_for(order.device, onnxruntime.get_available_providers())]
    options["providers"] = tuple(providers)
    models, policy = models_for(order, order.calibration, options.pop("weight_bits", None))
    threads = options.pop("threads", None)
    settings = Settings(
        threads=torch.get_num_threads() if threads is None else threads,
        device_id=order.device.index or 0,  # for a GPU's provider asked for by name alone
        **options,
    )
    files = [model.model.SerializeToString() for model in models]
    try:
        stages = OnnxStages(files, order.exits, thresholds_of(policy), settings)
    except RunnerError as error:
        raise ConfigError(f"backend='onnx': {error}") from error
    return Cascade(stages, order.costs, micro_batch=order.micro_batch or MICRO_BATCH)
