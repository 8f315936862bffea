"""Stages compiled by PyTorch's Inductor, for a few sizes of batches each.

A stage is a graph already, so it goes to the compiler as it is, without Dynamo before it: a call has no guards to
check (up to a third of a small stage's time at batch 1), nothing is compiled anew behind one's back, and
there is no limit behind which PyTorch falls back to running a stage uncompiled. What does not compile is an error.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shallowdeep.errors import ConfigError, NetworkError
from shallowdeep.inference.backends import PRECISIONS, Order
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.stages import Body, cut
from shallowdeep.inference.torch_stages import TorchCascade, TorchStages, index_on
from shallowdeep.networks.calls import first_line, without_autocast
from shallowdeep.networks.compiler import check_compiler
from shallowdeep.policies.rules import ExitPolicy
from shallowdeep.progress import track
from shallowdeep.storage import shown

LARGEST = 256  # size compiled for where nothing is asked, but on a CPU
RECORDING = 2
"""Calls of a CUDA graph before it replays: one warms up, one records."""

_compiling = threading.Lock()  # the compiler's settings are the process's
_replaying = threading.Lock()  # and CUDA graphs share one pool of memory


class CompiledStages(TorchStages):
    """The stages of a network, each compiled when it meets a size of batch for the first time.

    Feature maps go from stage to stage with their channels last. On a GPU each is replayed as a CUDA graph, one
    thread at a time.

    Args:
        bodies: as for ``TorchStages``.
        policy: as for ``TorchStages``.
        num_outputs: as for ``TorchStages``.
        sizes: of batches, rising.
        dtype: as for ``TorchStages``.
        progress: show what is compiled, on a terminal.
    """

    def __init__(
        self,
        bodies: Sequence[Body],
        policy: ExitPolicy,
        num_outputs: int,
        *,
        sizes: Sequence[int],
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
    ):
        super().__init__(bodies, policy, num_outputs, dtype=dtype)
        self.sizes = sizes
        self._progress = progress
        self._compiled: dict[tuple[int, int], Callable[..., Any]] = {}

    def call(self, stage: int, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Run a stage's compiled form.

        Raises:
            NetworkError: it does not compile.
        """
        inputs = [_laid_out(tensor) for tensor in inputs]
        compiled = self._compiled.get((stage, len(inputs[0]))) or self._compile(stage, inputs)
        return tuple(compiled(*inputs)) if self.device.type == "cpu" else _replayed(compiled, inputs)

    def take(self, values: Values, rows: np.ndarray) -> Values:
        """Some rows of every value, by index; channels stay last."""
        index = index_on(self.device, rows)
        return {name: _taken(value, index) for name, value in values.items()}

    def _compile(self, stage: int, inputs: list[Tensor]) -> Callable[..., Any]:
        rows, exit = len(inputs[0]), self.exits[stage]
        with _compiling:
            if (stage, rows) not in self._compiled:  # another thread may have been at it
                for _ in track([stage], 1, f"compiling to exit {exit}, {rows} rows", shown=self._progress):
                    compiled = _compiled(self.modules[stage], inputs, f"exit {exit}")
                    for _ in range(0 if self.device.type == "cpu" else RECORDING):
                        _replayed(compiled, inputs)
                    self._compiled[stage, rows] = compiled
            return self._compiled[stage, rows]


def _compiled(module: nn.Module, inputs: list[Any], name: str) -> Callable[..., Any]:
    on_cpu = inputs[0].device.type == "cpu"
    try:
        with warnings.catch_warnings():  # the compiler imports what PyTorch itself says is out of date
            warnings.filterwarnings("ignore", ".*torch.jit.script_method.*", DeprecationWarning)
            import torch._inductor.config as settings  # not above: only those who compile shall wait for it
            from torch.fx.experimental.proxy_tensor import make_fx

            # As an option of the call, freezing has no effect.
            patches = {"freezing": on_cpu, "triton.cudagraphs": not on_cpu}
            with torch.inference_mode(), without_autocast(), settings.patch(patches):
                compiled: Any = torch._inductor.compile(make_fx(module)(*inputs), inputs)
                return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler, or the one for C++ behind it, makes of a graph
        raise NetworkError(
            f"the stage up to {name} does not compile for {len(inputs[0])} rows: {first_line(error)}. "
            "Use backend='stages', which runs it as it is."
        ) from error


def _replayed(compiled: Callable[..., Any], inputs: list[Any]) -> tuple[Tensor, ...]:
    """What a CUDA graph gives, copied: the next replay writes over it."""
    with _replaying:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in compiled(*inputs))


def _laid_out(tensor: Tensor) -> Tensor:
    """A tensor as the stages are compiled for it."""
    return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format)


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor.index_select(0, index)
    return tensor.movedim(1, -1).index_select(0, index).movedim(-1, 1)  # by itself it would put channels first


def sizes_up_to(most: int) -> list[int]:
    """Sizes of batches worth compiling for: powers of two, from 16 on one more between each two, and ``most``.

    >>> sizes_up_to(40)
    [1, 2, 4, 8, 16, 24, 32, 40]
    """
    doubled = [2**power for power in range(most.bit_length())]
    between = [3 * size // 2 for size in doubled if size >= 16]
    return sorted({size for size in [*doubled, *between] if size < most} | {most})


def _checked_sizes(sizes: Any) -> list[int]:
    if (
        not isinstance(sizes, list | tuple)
        or not sizes
        or any(type(size) is not int or size < 1 for size in sizes)
        or list(sizes) != sorted(set(sizes))
    ):
        raise ConfigError(f"sizes are whole numbers of rows, rising, such as (1, 8, 32); got {shown(sizes)}.")
    return list(sizes)


def build_compiled(order: Order) -> TorchCascade:
    """Compiled stages.

    Its options are ``sizes``, the sizes of batches to compile for (others are filled up to the next), and
    ``progress``, to show on a terminal what is compiled.

    Raises:
        ConfigError: the sizes are none, or there is no C++ compiler (on a GPU: no Triton).
        NetworkError: the network cannot be cut.
    """
    options = order.take_options("sizes", "progress")
    device, most = order.device, order.rows or LARGEST
    sizes = sizes_up_to(most) if options.get("sizes") is None else _checked_sizes(options["sizes"])
    check_compiler(device, "backend='compiled'", "use backend='onnx' or 'stages'")
    stages = CompiledStages(
        cut(order.sdn, order.example_inputs, exits=order.exits),
        order.policy,
        order.sdn.num_outputs,
        sizes=sizes,
        dtype=PRECISIONS[order.precision],
        progress=bool(options.get("progress", False)),
    )
    return TorchCascade(stages, order.costs, micro_batch=min(most, sizes[-1]))
