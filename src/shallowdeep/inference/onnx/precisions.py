"""Stages as ONNX models in the precision that is asked for."""

from __future__ import annotations

from typing import Any

import torch

from shallowdeep.errors import ConfigError
from shallowdeep.inference.backends import Order
from shallowdeep.inference.onnx.convert import Converted, as_typed, convert
from shallowdeep.inference.onnx.fold import StageModel
from shallowdeep.inference.onnx.quantize import quantize_stages
from shallowdeep.inference.stages import as_values, thresholds_of
from shallowdeep.policies.rules import ExitPolicy

PRECISIONS = ("fp32", "int8")


def check_calibration(precision: str, calibration: Any) -> None:
    """Inputs to calibrate on are given for int8, and for that alone.

    Raises:
        ConfigError: they are missing, or given for another precision.
    """
    if precision != "int8" and calibration is not None:
        raise ConfigError(f"calibration= is for precision='int8', not for {precision!r}.")
    if precision == "int8" and calibration is None:
        raise ConfigError("int8 is calibrated on real inputs. Pass calibration=, some hundred of them.")


def quantised(converted: Converted, policy: ExitPolicy, calibration: Any) -> list[StageModel]:
    """The stages in int8.

    Raises:
        ConfigError: the inputs to calibrate on are not the network's.
    """
    values = {name: value.detach().cpu() for name, value in as_values(calibration).items()}
    if values.keys() != converted.examples.keys():
        raise ConfigError(f"the network takes {', '.join(converted.examples)}; calibration has {', '.join(values)}.")
    arrays = {name: value.numpy() for name, value in converted.as_exported(values).items()}
    return quantize_stages(converted.models, thresholds_of(policy), arrays, threads=torch.get_num_threads())


def models_for(order: Order, calibration: Any) -> tuple[list[StageModel], ExitPolicy]:
    """The stages that an order asks for as ONNX models, and its policy as it is in them."""
    check_calibration(order.precision, calibration)
    policy = as_typed(order.policy)
    converted = convert(order.sdn, policy, order.example_inputs)
    return (quantised(converted, policy, calibration) if order.precision == "int8" else converted.models), policy
