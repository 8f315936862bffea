"""The run times an engine may use, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from shallowdeep.errors import ConfigError, ShallowDeepError
from shallowdeep.inference.answers import Answers, Leaving
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.runner.sessions import RunnerError
from shallowdeep.networks.calls import first_line
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import Confidence, ExitPolicy, exits_of

NO_EXITS = Confidence(2.0, exits=())  # everybody leaves at the end, with its softmax
ALL_EXITS = Confidence(2.0)  # nobody leaves earlier, and every exit is run
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
MICRO_BATCH = 32  # rows at a time at which CPUs are best: larger blocks go back to the system in between


@runtime_checkable
class Driver(Protocol):
    """Runs batches for an engine: ``cascade.Cascade`` on stages, ``eager.Eager`` on the network itself.

    Attributes:
        costs: of leaving at each of its exits, as a share of the plain backbone.
        latency: what was measured, by which rows are dropped or carried.
        micro_batch: rows run at a time; ``None``: all that come together.
    """

    if TYPE_CHECKING:  # dataclasses' fields: an attribute that a protocol declares at run time must be on the class
        costs: Sequence[float]
        latency: Latency | None
        micro_batch: int | None

    @property
    def exits(self) -> Sequence[int]:
        """The exits at which samples may leave, the last among them."""
        ...

    def answer(self, inputs: Values, *, plan: np.ndarray | None = None) -> Answers:
        """Answer a batch."""
        ...

    def stream(
        self, batches: Iterable[Values], *, refill: bool = False, plan: np.ndarray | None = None
    ) -> Iterator[Leaving]:
        """Hand samples out when they leave."""
        ...

    def anytime(self, inputs: Values) -> Iterator[Leaving]:
        """What would be answered at each exit."""
        ...

    def logits(self, inputs: Values) -> list[Any]:
        """Logits at each exit, nobody leaving."""
        ...

    def measure(self, inputs: Values, sizes: Iterable[int], *, repeats: int) -> Latency:
        """How long each stage takes on batches made of the inputs' rows."""
        ...


@dataclass(frozen=True)
class Order:
    """What a back end is asked to run.

    Attributes:
        sdn: the network; not to be changed.
        policy: decides at each exit it looks at.
        precision: a key of ``PRECISIONS``.
        example_inputs: built as the network takes them.
        micro_batch: rows run at a time; ``None``: what the back end is best at.
        options: of the back end.
        calibration: inputs as the network takes them, on which ``"int8"`` is calibrated; ``None``: there are none.
    """

    sdn: ShallowDeepNetwork
    policy: ExitPolicy
    precision: str
    example_inputs: Any
    micro_batch: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Any = None

    @property
    def device(self) -> torch.device:
        """The network's."""
        return next(self.sdn.parameters()).device

    @property
    def rows(self) -> int | None:
        """Run at a time: as asked, else ``MICRO_BATCH`` on a CPU; elsewhere ``None``, all that come together."""
        return self.micro_batch or (MICRO_BATCH if self.device.type == "cpu" else None)

    @property
    def exits(self) -> list[int]:
        """The exits at which samples may leave."""
        return exits_of(self.policy, self.sdn.num_exits)

    @property
    def costs(self) -> tuple[float, ...]:
        """Of leaving at each of them, as a share of the plain backbone."""
        return tuple(self.sdn.costs.relative(self.exits[:-1])[self.exits].tolist())

    def take_options(self, *known: str) -> dict[str, Any]:
        """The options, of which a back end knows some.

        Raises:
            ConfigError: there are others.
        """
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            allowed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"this back end does not know {', '.join(unknown)}: {allowed}.")
        return dict(self.options)


@dataclass(frozen=True)
class Backend:
    """A run time.

    Attributes:
        home: the function that builds its driver from an ``Order``, as ``module:function``.
        precisions: those it has.
        on_tensors: it works on PyTorch's tensors, else on numpy's arrays.
    """

    home: str
    precisions: tuple[str, ...]
    on_tensors: bool = True

    @property
    def build(self) -> Callable[[Order], Driver]:
        """What builds its driver."""
        module, _, name = self.home.partition(":")
        return getattr(import_module(f"shallowdeep.inference.{module}"), name)


BACKENDS = {
    "eager": Backend("eager:build_eager", ("fp32", "bf16")),
    "stages": Backend("torch_stages:build_stages", ("fp32", "bf16")),
    "compiled": Backend("compiled:build_compiled", ("fp32", "bf16")),
    "onnx": Backend("onnx.onnxruntime:build_onnx", ("fp32", "int8"), on_tensors=False),
    "openvino": Backend("onnx.openvino:build_openvino", ("fp32", "bf16", "int8"), on_tensors=False),
    "plain": Backend("torch_stages:build_plain", ("fp32", "bf16")),
}


def why_not(error: Exception) -> str:
    """Why a back end cannot run, for those who try several: any exception may be the reason, a run time raises its own.

    Our own errors say what to do about it, and are given whole; of others their kind and first line.

    >>> why_not(ConfigError("no such device. Name another."))
    'no such device. Name another.'
    >>> why_not(ZeroDivisionError("division by zero"))
    'ZeroDivisionError: division by zero'
    """
    if isinstance(error, (ShallowDeepError, RunnerError, ImportError)):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line(error)}"
