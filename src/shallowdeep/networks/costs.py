"""What an exit costs: FLOPs and parameters of backbone and heads, apart, up to each exit.

FLOPs count 2 per multiply-add, as PyTorch's own counter does; batch-norm, activations, pooling and softmax
count 0. A relative cost is a share of the plain backbone's FLOPs (1.0).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shallowdeep.errors import TraceError
from shallowdeep.networks.calls import call, evaluating


@dataclass(frozen=True)
class Costs:
    """FLOPs and parameters for one sample, one entry per exit, the last being the backbone's own output.

    Attributes:
        backbone_flops: from the input up to each exit's tap.
        head_flops: of each exit's own classifier; of the final head, else 0, at the last exit.
        backbone_params: used from the input up to each exit's tap.
        head_params: of each exit's own classifier; of the final head, else 0, at the last exit.
        nominal: the cost shares an exit was *asked* to sit at, the last 1.0; ``None`` where taps were
            given by name. The paper weighs losses and counts wasted computation with these.
        plain_flops: of the network whose cost is 1.0; ``None``: the backbone. In a cascade of two networks it is
            the second alone.

    Backbone and heads are kept apart so that an exit that is switched off costs nothing.
    """

    backbone_flops: tuple[int | float, ...]
    head_flops: tuple[int | float, ...]
    backbone_params: tuple[int, ...]
    head_params: tuple[int, ...]
    nominal: tuple[float, ...] | None = None
    plain_flops: int | float | None = None

    def __post_init__(self) -> None:
        lengths = {
            len(self.backbone_flops),
            len(self.head_flops),
            len(self.backbone_params),
            len(self.head_params),
        }
        if self.nominal is not None:
            lengths.add(len(self.nominal))
        if len(lengths) != 1 or not self.backbone_flops:
            raise TraceError(f"costs need one entry per exit in every list, got lists of {sorted(lengths)}.")
        counts = (*self.backbone_flops, *self.head_flops, *self.backbone_params, *self.head_params)
        if min(counts) < 0:
            raise TraceError(f"FLOPs and parameters are counted from 0 on, got {min(counts)}.")
        if list(self.backbone_flops) != sorted(self.backbone_flops) or self.backbone_flops[-1] <= 0:
            raise TraceError(f"backbone FLOPs must rise from exit to exit, got {self.backbone_flops}.")
        if self.plain_flops is not None and self.plain_flops <= 0:
            raise TraceError(f"the plain network's FLOPs must be above 0, got {self.plain_flops}.")

    @property
    def num_exits(self) -> int:
        """Number of exits, the last included."""
        return len(self.backbone_flops)

    def relative(self, exits: Iterable[int] | None = None) -> Float64[Tensor, " exits"]:
        """Cost of leaving at each exit, earlier enabled exits included, as a share of the plain backbone.

        Args:
            exits: the internal exits that are switched on; ``None``: all.

        >>> costs = Costs((40, 100), (10, 0), (1, 2), (3, 0))
        >>> costs.relative().tolist()
        [0.5, 1.1]
        >>> costs.relative(exits=[]).tolist()
        [0.4, 1.0]
        """
        enabled = torch.zeros(self.num_exits, dtype=torch.float64)
        enabled[list(range(self.num_exits) if exits is None else exits)] = 1
        enabled[-1] = 1  # whoever gets there pays for a final head
        heads = torch.tensor(self.head_flops, dtype=torch.float64) * enabled
        total = torch.tensor(self.backbone_flops, dtype=torch.float64) + heads.cumsum(0)
        return total / (self.plain_flops or self.backbone_flops[-1])

    def select(self, exits: Iterable[int]) -> Costs:
        """The same costs with only some exits, by index."""
        exits = list(exits)

        def pick(values: tuple) -> tuple:
            return tuple(values[i] for i in exits)

        return Costs(
            pick(self.backbone_flops),
            pick(self.head_flops),
            pick(self.backbone_params),
            pick(self.head_params),
            None if self.nominal is None else pick(self.nominal),
            self.plain_flops,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; ``from_dict`` reads them back."""
        values = asdict(self)
        return values if self.plain_flops is not None else {k: v for k, v in values.items() if k != "plain_flops"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Costs:
        """Read back what ``to_dict`` gave."""
        lists: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list | tuple) else value for key, value in values.items()
        }
        return cls(**lists)

    @classmethod
    def from_totals(cls, totals: Iterable[int | float]) -> Costs:
        """Costs where only the total up to each exit is known, in any unit; the last is the plain network's.

        They stand where FLOPs do, fractions too. Costs of two networks compare in one unit only.

        >>> Costs.from_totals([0.25, 0.5, 1.0]).relative().tolist()
        [0.25, 0.5, 1.0]
        """
        values = [float(total) for total in totals]
        if not values or not all(math.isfinite(v) and v >= 0 for v in values) or values[-1] <= 0:
            raise TraceError(f"costs are finite numbers from 0 on, one per exit, the last above 0; got {values}.")
        none = (0,) * len(values)
        return cls(tuple(int(value) if value.is_integer() else value for value in values), none, none, none)


def count_flops(module: nn.Module, inputs: Any) -> int:
    """FLOPs of one forward in evaluation mode, 2 per multiply-add.

    Attention is counted through its plain mathematics, LSTMs by the shapes of their matrices: PyTorch's counter gives
    their fused kernels 0 on a CPU, and all recurrent layers 0 on a GPU.

    >>> count_flops(nn.Linear(10, 3), torch.zeros(1, 10))
    60
    """
    with evaluating(module), flop_counter() as counter:
        call(module, inputs)
    return counter.get_total_flops()


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count FLOPs inside the context, also where PyTorch counts 0: fused attention on a CPU, fused recurrent layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    recurrent = {torch.ops.aten.mkldnn_rnn_layer: _onednn_layer, torch.ops.aten._cudnn_rnn: _cudnn_layers}
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=recurrent) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _onednn_layer(inputs: Sequence[int], of_inputs: Sequence[int], of_state: Sequence[int], *_: Any, **__: Any) -> int:
    """An LSTM's layer in one direction, from the shapes of what it reads and of its two matrices."""
    return 2 * math.prod(inputs[:-1]) * (math.prod(of_inputs) + math.prod(of_state))


def _cudnn_layers(inputs: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """A recurrent module's layers and directions: every matrix multiplies once a step, biases count 0."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


def count_params(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
