"""What a benchmark times: engines with their exits, and what each is compared to in its own run time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from shallowdeep.errors import ConfigError
from shallowdeep.inference.answers import Answers
from shallowdeep.inference.backends import BACKENDS, NO_EXITS, Driver, why_not
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.engine import Engine
from shallowdeep.inference.runner.sessions import DEVICES
from shallowdeep.inference.runner.stages import OnnxStages
from shallowdeep.inference.sizes import powers_up_to, rows_at_a_time
from shallowdeep.inference.stages import as_values
from shallowdeep.inference.timing.bare import bare_compiled, bare_onnx
from shallowdeep.inference.timing.one_at_a_time import OneAtATime
from shallowdeep.inference.timing.smaller import ending_at
from shallowdeep.inference.timing.speed import (
    ALL_EXITS,
    BARE,
    EXITS,
    IN_PARTS,
    MICRO_BATCH,
    NOBODY,
    ONE_AT_A_TIME,
    PLAIN,
    WHOLE_BATCH,
    LeftOut,
    static,
)
from shallowdeep.inference.timing.whole import in_one_piece
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import ExitPolicy
from shallowdeep.progress import bar
from shallowdeep.traces.trace import Trace

ONLY_AS_ACCURATE = ("compiled",)  # takes so long to build that of the smaller networks only one is
BARE_WAYS = ("compiled", "onnx")  # where one would run the network otherwise, had one not this package


@dataclass(frozen=True)
class Lane:
    """One thing to be timed.

    Attributes:
        backend: what runs it.
        precision: of weights and arithmetic.
        variant: a key of ``VARIANTS``, or that of a smaller network.
        device: that it runs on.
        run: answers a batch; ``None`` where only logits are computed.
        engine: of one with exits, whose stages are timed as well.
        above: it is timed on larger batches alone.
    """

    backend: str
    precision: str
    variant: str
    device: str
    run: Callable[[Any], Answers | None]
    engine: Engine | None = None
    above: int = 0


@dataclass
class Workshop:
    """Builds what is to be timed, and notes what cannot be built.

    Attributes:
        sdn: the network; not changed.
        policies: by precision.
        example: a few samples, as the network takes them.
        trace: of the samples, in fp32.
        options: of each back end by name.
        calibration: inputs on which ``"int8"`` is calibrated.
        batch_sizes: of the batches that will come.
        lanes: built so far.
        left_out: what could not be.
    """

    sdn: ShallowDeepNetwork
    policies: Mapping[str, ExitPolicy]
    example: Any
    trace: Trace
    options: Mapping[str, Mapping[str, Any]]
    calibration: Any
    batch_sizes: Sequence[int]
    lanes: list[Lane] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def build(self, backends: Sequence[str], precisions: Sequence[str], *, smaller: bool, progress: bool) -> None:
        """Build the lanes of some back ends in some precisions.

        Args:
            backends: with exits.
            precisions: of each of them.
            smaller: the networks that end at one exit as well.
            progress: draw a bar on the terminal.

        Raises:
            ConfigError: no back end can be built.
        """
        self._plain("eager", "fp32")
        with self._noting("eager", "fp32", ONE_AT_A_TIME):
            alone = OneAtATime(self.sdn, self.policies["fp32"], self.example)
            self._add(Lane("eager", "fp32", ONE_AT_A_TIME, self._device, alone))
        pairs = [(backend, precision) for precision in dict.fromkeys(precisions) for backend in dict.fromkeys(backends)]
        with bar("build", len(pairs), shown=progress) as line:
            for backend, precision in pairs:
                line.say(f"{backend} {precision}")
                engine = None
                with self._noting(backend, precision):
                    engine = self._with_exits(backend, precision)
                if engine is not None:
                    self._beside(engine, backend, precision, smaller)
                line.advance()
        if not any(lane.engine for lane in self.lanes):
            raise ConfigError("no back end could be built: " + "; ".join(str(one) for one in self.left_out))

    @property
    def _device(self) -> str:
        """The network's."""
        return str(next(self.sdn.parameters()).device)

    @contextmanager
    def _noting(self, backend: str, precision: str, variant: str = "") -> Iterator[None]:
        """Something is built inside; where it cannot be, the others are timed all the same."""
        try:
            yield
        except Exception as error:  # a run time may fail in any way
            self.left_out.append(LeftOut(backend, precision, variant, why_not(error)))

    def _add(self, lane: Lane) -> None:
        """Run a lane once, so that what cannot run is known now, and keep it."""
        lane.run(self.example)
        self.lanes.append(lane)

    def _with_exits(self, backend: str, precision: str) -> Engine:
        engine = self._engine(self.sdn, self.policies[precision], backend, precision)
        driver, _ = engine.ready(self.example)
        engine.measure(self.example, powers_up_to(rows_at_a_time(driver, max(self.batch_sizes))))
        self.lanes.append(Lane(backend, precision, EXITS, self._place(driver, backend), engine, engine))
        return engine

    def _beside(self, engine: Engine, backend: str, precision: str, smaller: bool) -> None:
        """What an engine is compared to in its own run time and precision."""
        if (backend, precision) != ("eager", "fp32"):
            self._plain(backend, precision)
        if backend in BARE_WAYS:
            with self._noting(backend, precision, BARE):
                self._bare(engine, backend, precision)
        driver, _ = engine.ready(self.example)
        device, last = self._place(driver, backend), self.sdn.num_exits - 1
        rows = sorted({rows_at_a_time(driver, size) for size in self.batch_sizes})

        def nobody(inputs: Any) -> Answers:
            driver, values = engine.ready(inputs)
            return driver.answer(values, plan=np.full(len(next(iter(values.values()))), last))

        with self._noting(backend, precision, NOBODY):
            self._add(Lane(backend, precision, NOBODY, device, nobody))
        with self._noting(backend, precision, ALL_EXITS):
            net = in_one_piece(self.sdn, engine.exits)
            whole, _ = self._without_exits(net, backend, precision, rows).ready(self.example)

            def all_exits(inputs: Any) -> None:  # the network alone: inputs are not checked, no answers collected
                whole.logits(self._values(inputs, backend))

            self._add(Lane(backend, precision, ALL_EXITS, device, all_exits))
        for exit in self._smaller_exits(backend, precision) if smaller else ():
            with self._noting(backend, precision, static(exit)):
                net = ending_at(self.sdn, exit, exportable=backend != "eager")
                small = self._without_exits(net, backend, precision, rows)
                self._add(Lane(backend, precision, static(exit), device, small))

    def _plain(self, backend: str, precision: str) -> None:
        """The network without exits, a batch in one call and in parts."""
        most = max(self.batch_sizes)
        ways = [(WHOLE_BATCH, most, 0), *([(IN_PARTS, MICRO_BATCH, MICRO_BATCH)] if most > MICRO_BATCH else [])]
        with self._noting(backend, precision, PLAIN):
            sizes = sorted({*self.batch_sizes, *(rows for _, rows, _ in ways)})
            engine = self._without_exits(self.sdn, backend, precision, sizes)
            driver, _ = engine.ready(self.example)
            for variant, rows, above in ways:
                run = partial(_answered, engine, replace(driver, micro_batch=rows))  # type: ignore[type-var]
                self._add(Lane(backend, precision, variant, self._place(driver, backend), run, above=above))

    def _bare(self, engine: Engine, backend: str, precision: str) -> None:
        options, calibration = self.options.get(backend, {}), self._calibration(precision)
        if backend == "compiled":
            bare = bare_compiled(self.sdn, precision, self.example, self.batch_sizes)
        else:
            bare = bare_onnx(self.sdn, precision, self.example, options, calibration)

        def run(inputs: Any) -> None:
            bare(inputs)

        driver, _ = engine.ready(self.example)
        self.lanes.append(Lane(backend, precision, BARE, self._place(driver, backend), run))

    def _smaller_exits(self, backend: str, precision: str) -> list[int]:
        internal = list(range(self.sdn.num_exits - 1))
        if backend not in ONLY_AS_ACCURATE:
            return internal
        wanted = replay(self.trace, self.policies["fp32"]).accuracy
        accuracies = self.trace.correct.double().mean(0).tolist()
        found = next(([exit] for exit in internal if accuracies[exit] >= wanted), [])
        only = (
            f"built for exit {found[0]} alone, the first as accurate as the engine" if found else "none is as accurate"
        )
        self.left_out.append(LeftOut(backend, precision, "smaller networks", only))
        return found

    def _without_exits(self, sdn: ShallowDeepNetwork, backend: str, precision: str, sizes: Sequence[int]) -> Engine:
        """A network in which nobody leaves before the end, ready; compiled for batches of these sizes, rising."""
        given = {"sizes": list(sizes), **self.options.get(backend, {})} if backend == "compiled" else {}
        own = "plain" if backend == "eager" else backend
        return self._engine(sdn, NO_EXITS, own, precision, **given)

    def _engine(self, sdn: ShallowDeepNetwork, policy: ExitPolicy, backend: str, precision: str, **more: Any) -> Engine:
        return Engine(
            sdn,
            policy,
            backend=backend,
            precision=precision,
            example_inputs=self.example,
            **{"calibration": self._calibration(precision), **self.options.get(backend, {}), **more},
        )

    def _calibration(self, precision: str) -> Any:
        return self.calibration if precision == "int8" else None

    def _values(self, inputs: Any, backend: str) -> Values:
        """Inputs as a back end takes them, not checked."""
        values = as_values(inputs)
        if not BACKENDS[backend].on_tensors:
            return {name: tensor.detach().cpu().numpy() for name, tensor in values.items()}
        device = next(self.sdn.parameters()).device
        return {name: tensor.to(device) for name, tensor in values.items()}

    def _place(self, driver: Driver, backend: str) -> str:
        """The device that a driver runs on."""
        if BACKENDS[backend].on_tensors:
            return self._device
        stages = getattr(driver, "stages", None)
        if isinstance(stages, OnnxStages):
            provider = stages.sessions[0].get_providers()[0]
            return DEVICES.get(provider, "cpu" if provider == "CPUExecutionProvider" else provider)
        return str(self.options.get(backend, {}).get("device") or "cpu").lower()


def _answered(engine: Engine, driver: Driver, inputs: Any) -> Answers:
    """What an engine answers by another driver."""
    _, values = engine.ready(inputs)
    return driver.answer(values)
