"""The exported stages in ONNX Runtime, in this process."""

from __future__ import annotations

import torch

from shallowdeep.errors import ConfigError, require
from shallowdeep.inference.backends import Order
from shallowdeep.inference.onnx.precisions import models_for
from shallowdeep.inference.runner import Cascade, OnnxStages, RunnerError, Settings
from shallowdeep.inference.stages import thresholds_of

MICRO_BATCH = 32  # rows at a time at which ONNX Runtime is best; larger blocks go back to the system in between


def build_onnx(order: Order) -> Cascade:
    """Stages in ONNX Runtime, in this process.

    Options: ``threads`` (``None``: as many as PyTorch uses), ``providers``, ``spinning``, ``shared_pool`` (see
    ``runner.Settings``), and for int8 ``calibration``, inputs as the network takes them.
    """
    require("onnxruntime", extra="onnx")
    options = order.take_options("threads", "providers", "spinning", "shared_pool", "calibration")
    models, policy = models_for(order, options.pop("calibration", None))
    threads = options.pop("threads", None)
    if "providers" in options:
        options["providers"] = tuple(options["providers"])
    settings = Settings(threads=torch.get_num_threads() if threads is None else threads, **options)
    files = [model.model.SerializeToString() for model in models]
    try:
        stages = OnnxStages(files, order.exits, thresholds_of(policy), settings)
    except RunnerError as error:
        raise ConfigError(f"backend='onnx': {error}") from error
    return Cascade(stages, order.costs, micro_batch=order.micro_batch or MICRO_BATCH)
