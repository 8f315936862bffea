"""Stages as PyTorch modules, run one after another."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.inference.answers import Answers
from shallowdeep.inference.backends import PRECISIONS, Order
from shallowdeep.inference.cascade import Cascade, Step, Values
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.stages import Body, Stage, as_inputs, cut, thresholds_of
from shallowdeep.networks.calls import exact_float32, in_eval_mode
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy


class TorchStages:
    """The stages of a network, each called as a PyTorch module (see ``cascade.Stages``).

    Args:
        bodies: what ``cut`` gave, on the device they shall run on.
        policy: decides behind each.
        num_outputs: columns of every exit's logits.
        dtype: of weights and arithmetic; the policy's own is float32.
    """

    sizes: Sequence[int] | None = None

    def __init__(
        self, bodies: Sequence[Body], policy: ExitPolicy, num_outputs: int, *, dtype: torch.dtype = torch.float32
    ):
        self.exits = [body.exit for body in bodies]
        self.modules = [
            Stage(body, policy, num_outputs, is_first=i == 0, dtype=dtype).eval() for i, body in enumerate(bodies)
        ]
        self.device = next(bodies[0].graph.parameters()).device
        self._thresholds = [torch.tensor(number, device=self.device) for number in thresholds_of(policy).values()]
        self._wanted = [{name for later in self.modules[i + 1 :] for name in later.inputs} for i in range(len(bodies))]

    def run(self, stage: int, values: Values) -> Step:
        """Run one stage on at least one row."""
        module = self.modules[stage]
        with torch.inference_mode(), exact_float32():
            *given, stop, scores, logits = self.call(
                stage, [*(values[name] for name in module.inputs), *self._thresholds]
            )
        known = {**values, **dict(zip(module.outputs, given, strict=True))}
        return Step({name: known[name] for name in known if name in self._wanted[stage]}, stop, scores, logits)

    def call(self, stage: int, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """How a stage's module is called."""
        return self.modules[stage](*inputs)

    def fetch(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """``stop`` and ``scores`` as numpy arrays; from a GPU in one copy."""
        return fetch(step.stop, step.scores)

    def take(self, values: Values, rows: np.ndarray) -> Values:
        """Some rows of every value, by index."""
        return take(values, rows)

    def join(self, parts: Sequence[Values]) -> Values:
        """The rows of several values, one after another."""
        return join(parts)

    def wait(self) -> None:
        """Wait until the device has done all that it was asked for."""
        wait_for(self.device)


def fetch(stop: Tensor, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``stop`` and ``scores`` as numpy arrays; from a GPU in one copy."""
    if stop.device.type == "cpu":
        return stop.numpy(), scores.numpy()
    packed = torch.cat([stop[:, None].to(scores.dtype), scores], dim=1).cpu().numpy()
    return packed[:, 0] > 0, packed[:, 1:]


class TorchCascade(Cascade):
    """Stages of PyTorch in a row: exact in float32, by switches that are set once a call rather than once a stage.

    While a stream or ``anytime`` waits for whoever reads it, other code runs: there each stage sets them.
    """

    def answer(self, inputs: Values, *, plan: np.ndarray | None = None) -> Answers:
        """See ``Cascade.answer``."""
        with exact_float32():
            return super().answer(inputs, plan=plan)

    def logits(self, inputs: Values) -> list[np.ndarray]:
        """See ``Cascade.logits``."""
        with exact_float32():
            return super().logits(inputs)

    def measure(self, inputs: Values, sizes: Iterable[int], *, repeats: int) -> Latency:
        """See ``Cascade.measure``."""
        with exact_float32():
            return super().measure(inputs, sizes, repeats=repeats)


class PlainStage:
    """The backbone alone, as one stage at whose end everybody leaves (see ``cascade.Stages``)."""

    sizes: Sequence[int] | None = None

    def __init__(self, sdn: ShallowDeepNetwork, like: Any):
        self.exits = [sdn.num_exits - 1]
        self.device = next(sdn.parameters()).device
        self._sdn, self._like = sdn, like

    def run(self, stage: int, values: Values) -> Step:
        """Run the whole backbone."""
        dtype = next(self._sdn.parameters()).dtype
        values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
        with torch.no_grad(), in_eval_mode(self._sdn), exact_float32():
            logits = self._sdn.run_backbone(as_inputs(values, self._like)).float()
        return Step({}, torch.ones(len(logits), dtype=torch.bool, device=logits.device), logits.softmax(-1), logits)

    def fetch(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """``stop`` and ``scores`` as numpy arrays."""
        return fetch(step.stop, step.scores)

    def take(self, values: Values, rows: np.ndarray) -> Values:
        """Some rows of every value, by index."""
        return take(values, rows)

    def join(self, parts: Sequence[Values]) -> Values:
        """The rows of several values, one after another."""
        return join(parts)

    def wait(self) -> None:
        """Wait until the device has done all that it was asked for."""
        wait_for(self.device)


def take(values: Values, rows: np.ndarray) -> Values:
    """Some rows of every tensor, by index."""
    index = index_on(next(iter(values.values())).device, rows)
    return {name: value.index_select(0, index) for name, value in values.items()}


def index_on(device: torch.device, rows: np.ndarray) -> Tensor:
    """Indices of rows on a device, without waiting for it."""
    return torch.from_numpy(rows).to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was asked for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def join(parts: Sequence[Values]) -> Values:
    """The rows of several tensors by name, one after another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def network_for(order: Order) -> ShallowDeepNetwork:
    """The network in the precision that is asked for: itself, or a copy."""
    if order.precision == "fp32":
        return order.sdn
    return copy.deepcopy(order.sdn).to(PRECISIONS[order.precision])


def build_stages(order: Order) -> TorchCascade:
    """Exported stages, run as they are: what every other run time of stages is compared to."""
    order.take_options()
    bodies = cut(order.sdn, order.example_inputs, exits=order.exits)
    stages = TorchStages(bodies, order.policy, order.sdn.num_outputs, dtype=PRECISIONS[order.precision])
    return TorchCascade(stages, order.costs, micro_batch=order.rows)


def build_plain(order: Order) -> TorchCascade:
    """The backbone alone."""
    order.take_options()
    sdn = network_for(order)
    cost = sdn.costs.relative([])[-1].item()
    return TorchCascade(PlainStage(sdn, order.example_inputs), [cost], micro_batch=order.rows)
