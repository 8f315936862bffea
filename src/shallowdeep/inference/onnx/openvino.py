"""The exported stages in OpenVINO: the same models as for ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from shallowdeep.errors import ConfigError, NetworkError, require
from shallowdeep.inference.backends import MICRO_BATCH, Order
from shallowdeep.inference.cascade import Cascade, Step, Values
from shallowdeep.inference.onnx.precisions import models_for
from shallowdeep.inference.runner.device import join_rows, take_rows
from shallowdeep.inference.runner.stages import step_of
from shallowdeep.inference.stages import thresholds_of
from shallowdeep.networks.calls import first_line

HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}  # left alone, OpenVINO takes bf16 where a processor has it


class OpenVinoStages:
    """The stages of a network in OpenVINO, a compiled model each (see ``cascade.Stages``).

    Args:
        models: shallow to deep, each the bytes of an ONNX file.
        exits: index of the exit that each ends at.
        thresholds: the policy's numbers by name.
        precision: of arithmetic where the model does not say int8.
        threads: that share the work of one operator; 0: as many as OpenVINO likes.
        device: by OpenVINO's name.

    Raises:
        ConfigError: the device is not there, or has not got the precision.
        NetworkError: OpenVINO does not take a stage.
    """

    sizes: Sequence[int] | None = None

    def __init__(
        self,
        models: Sequence[bytes],
        exits: Sequence[int],
        thresholds: Mapping[str, float | int],
        *,
        precision: str = "fp32",
        threads: int = 0,
        device: str = "CPU",
    ):
        core = openvino_core()
        _check_device(core, device, precision)
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        self.exits = list(exits)
        self._models = []
        for exit, model in zip(exits, models, strict=True):
            try:
                self._models.append(core.compile_model(core.read_model(model), device, config))
            except Exception as error:  # an operator it does not know, a driver that is not there
                raise NetworkError(
                    f"OpenVINO does not take the stage up to exit {exit}: {first_line(error)}. Use backend='onnx'."
                ) from error
        self._own = threading.local()  # a request runs once at a time: every thread has its own
        self._inputs = [[port.get_any_name() for port in one.inputs] for one in self._models]
        self._outputs = [[port.get_any_name() for port in one.outputs] for one in self._models]
        self._wanted = [
            {name for later in self._inputs[place + 1 :] for name in later} for place in range(len(self._models))
        ]
        self._thresholds = {
            name: np.array(number, dtype=np.int64 if isinstance(number, int) else np.float32)
            for name, number in thresholds.items()
        }

    def run(self, stage: int, values: Values) -> Step:
        """Run one stage on at least one row."""
        feeds = {name: self._thresholds.get(name, values.get(name)) for name in self._inputs[stage]}
        if not hasattr(self._own, "requests"):
            self._own.requests = [model.create_infer_request() for model in self._models]
        results = self._own.requests[stage].infer(feeds, share_inputs=True)
        return step_of(dict(zip(self._outputs[stage], results.values(), strict=True)), values, self._wanted[stage])

    def fetch(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """``stop`` and ``scores``, which are numpy arrays already."""
        return step.stop, step.scores

    def take(self, values: Values, rows: np.ndarray) -> Values:
        """Some rows of every value, by index."""
        return take_rows(values, rows)

    def join(self, parts: Sequence[Values]) -> Values:
        """The rows of several values, one after another."""
        return join_rows(parts)

    def wait(self) -> None:
        """Nothing is left to wait for: a request's ``infer`` returns when its device is done."""


_STARTING = threading.Lock()


def openvino_core() -> Any:
    """The one ``openvino.Core`` of this process, which is never let go.

    Each core gives the thread that starts it a stack for signals, and gives back at its end the one that it found
    (OpenVINO 2026.4). Let go in the order in which they came, two cores leave the thread a stack that is unmapped:
    the next signal with a Python handler, Ctrl-C or a worker of a ``DataLoader`` that ends, kills the process.

    Raises:
        MissingExtra: OpenVINO is not installed.
    """
    with _STARTING:
        return _only_core()


@cache
def _only_core() -> Any:
    return require("openvino", extra="openvino").Core()


def _check_device(core: Any, device: str, precision: str) -> None:
    if device not in core.available_devices:
        raise ConfigError(f"OpenVINO has no device {device!r} here, only {', '.join(core.available_devices)}.")
    able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    wanted = {"fp32": "FP32", "int8": "INT8", "bf16": "BF16"}[precision]
    if wanted not in able:
        raise ConfigError(f"OpenVINO's {device} has no {precision} here, only {', '.join(able)}.")


def device_for(device: torch.device, available: Sequence[str]) -> str:
    """OpenVINO's name of a network's device: it shares the CPU with PyTorch, and no other that one could be sure of.

    Args:
        device: the network's.
        available: the devices that OpenVINO has.

    Raises:
        ConfigError: it has none that is the network's.
    """
    if device.type != "cpu":
        raise ConfigError(
            f"backend='openvino' does not compute on {device}; OpenVINO has {', '.join(available)} here. "
            'Name one of these by device=, or compute on the CPU: sdn.to("cpu").'
        )
    return "CPU"


def build_openvino(order: Order) -> Cascade:
    """Stages in OpenVINO.

    Options: ``threads`` (``None``: as many as PyTorch uses), ``device`` (``None``: the network's, the CPU), and for
    int8 ``weight_bits`` (see ``quantize_stages``).

    Raises:
        ConfigError: OpenVINO has not got the device, or not the precision on it.
        NetworkError: the network has no ONNX form, or none in this precision, or OpenVINO does not take it.
    """
    options = order.take_options("threads", "device", "weight_bits")
    if options.get("device") is None:
        options["device"] = device_for(order.device, openvino_core().available_devices)
    models, policy = models_for(order, order.calibration, options.pop("weight_bits", None))
    threads = options.pop("threads", None)
    stages = OpenVinoStages(
        [model.model.SerializeToString() for model in models],
        order.exits,
        thresholds_of(policy),
        precision=order.precision,
        threads=torch.get_num_threads() if threads is None else threads,
        **options,
    )
    return Cascade(stages, order.costs, micro_batch=order.micro_batch or MICRO_BATCH)
