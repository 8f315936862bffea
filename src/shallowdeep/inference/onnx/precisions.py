"""Stages as ONNX models in the precision that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shallowdeep.errors import ConfigError, DataError
from shallowdeep.inference.backends import Order
from shallowdeep.inference.onnx.convert import Converted, as_typed, convert
from shallowdeep.inference.onnx.fold import StageModel
from shallowdeep.inference.onnx.handover import in_eight_bits
from shallowdeep.inference.onnx.layout import kept_blocked
from shallowdeep.inference.onnx.quantize import quantize_stages
from shallowdeep.inference.stages import as_values, check_values, thresholds_of
from shallowdeep.policies.rules import ExitPolicy

PRECISIONS = ("fp32", "int8")
WEIGHT_BITS = (7, 8)  # of int8; in 8 bits products saturate on processors without VNNI


def check_calibration(precision: str, calibration: Any, weight_bits: int | None = None) -> None:
    """Inputs to calibrate on, and bits of weights, are given for int8, and for that alone.

    Raises:
        ConfigError: inputs are missing, one is given for another precision, or weights have no such number of bits.
    """
    if weight_bits is not None and precision != "int8":
        raise ConfigError(f"weight_bits= is for precision='int8', not for {precision!r}.")
    if weight_bits is not None and weight_bits not in WEIGHT_BITS:
        raise ConfigError(f"weights of int8 have 7 bits or 8, got weight_bits={weight_bits!r}.")
    if precision != "int8" and calibration is not None:
        raise ConfigError(f"calibration= is for precision='int8', not for {precision!r}.")
    if precision == "int8" and calibration is None:
        raise ConfigError("int8 is calibrated on real inputs. Pass calibration=, some hundred of them.")


def models_in(
    precision: str, converted: Converted, policy: ExitPolicy, calibration: Any = None, weight_bits: int | None = None
) -> list[StageModel]:
    """The stages in a precision.

    Raises:
        ConfigError: the inputs to calibrate on are not the network's.
    """
    if precision == "int8":
        return _quantised(converted, policy, calibration, weight_bits)
    return converted.models


def laid_out(models: Sequence[StageModel], precision: str) -> list[StageModel]:
    """The stages as ONNX Runtime runs them fastest; OpenVINO takes them as they are.

    VGG-16's int8 stages took OpenVINO 1.3 × as long like this (8 and 32 images); ResNet-56's took no longer.
    """
    return in_eight_bits(models) if precision == "int8" else [kept_blocked(model) for model in models]


def _quantised(converted: Converted, policy: ExitPolicy, calibration: Any, weight_bits: int | None) -> list[StageModel]:
    values = {name: value.detach().cpu() for name, value in as_values(calibration).items()}
    try:
        check_values(values, converted.examples)
    except DataError as error:
        raise ConfigError(f"calibration= does not fit: {error} Pass inputs as the network takes them.") from None
    arrays = {name: value.numpy() for name, value in converted.as_exported(values).items()}
    bits = WEIGHT_BITS[0] if weight_bits is None else weight_bits
    threads = torch.get_num_threads()
    return quantize_stages(converted.models, thresholds_of(policy), arrays, threads=threads, weight_bits=bits)


def models_for(order: Order, calibration: Any, weight_bits: int | None = None) -> tuple[list[StageModel], ExitPolicy]:
    """The stages that an order asks for as ONNX models, and its policy as it is in them."""
    check_calibration(order.precision, calibration, weight_bits)
    policy = as_typed(order.policy)
    converted = convert(order.sdn, policy, order.example_inputs)
    return models_in(order.precision, converted, policy, calibration, weight_bits), policy
