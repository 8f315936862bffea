"""What a benchmark times: engines with their exits, and what each is compared to in its own run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shallowdeep.errors import ConfigError
from shallowdeep.inference.backends import NO_EXITS
from shallowdeep.inference.engine import Engine
from shallowdeep.inference.runner import Answers
from shallowdeep.inference.sizes import powers_up_to, rows_at_a_time
from shallowdeep.inference.speed import ALL_EXITS, EXITS, NOBODY, ONE_AT_A_TIME, PLAIN, SPINNING, LeftOut, static
from shallowdeep.inference.timing.one_at_a_time import OneAtATime
from shallowdeep.inference.timing.smaller import ending_at
from shallowdeep.networks.calls import first_line
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import ExitPolicy
from shallowdeep.progress import bar
from shallowdeep.traces.trace import Trace

ONLY_AS_ACCURATE = ("compiled",)  # takes so long to build that of the smaller networks only one is


@dataclass(frozen=True)
class Lane:
    """One thing to be timed.

    Attributes:
        backend: what runs it.
        precision: of weights and arithmetic.
        variant: a key of ``VARIANTS``, or that of a smaller network.
        run: answers a batch; ``None`` where only logits are computed.
        engine: of one with exits, whose stages are timed as well.
    """

    backend: str
    precision: str
    variant: str
    run: Callable[[Any], Answers | None]
    engine: Engine | None = None


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
        lanes: built so far.
        left_out: what could not be.
    """

    sdn: ShallowDeepNetwork
    policies: Mapping[str, ExitPolicy]
    example: Any
    trace: Trace
    options: Mapping[str, Mapping[str, Any]]
    calibration: Any
    lanes: list[Lane] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def build(
        self, backends: Sequence[str], precisions: Sequence[str], most: int, *, smaller: bool, progress: bool
    ) -> None:
        """Build the lanes of some back ends in some precisions.

        Args:
            backends: with exits.
            precisions: of each of them.
            most: rows of the largest batch that will come.
            smaller: the networks that end at one exit as well.
            progress: draw a bar on the terminal.

        Raises:
            ConfigError: no back end can be built.
        """
        self._without_exits("eager", "fp32", PLAIN)
        self._lane("eager", "fp32", ONE_AT_A_TIME, lambda: OneAtATime(self.sdn, self.policies["fp32"], self.example))
        pairs = [(backend, precision) for precision in dict.fromkeys(precisions) for backend in dict.fromkeys(backends)]
        with bar("build", len(pairs), shown=progress) as line:
            for backend, precision in pairs:
                line.say(f"{backend} {precision}")
                engine = self._with_exits(backend, precision, most)
                if engine is not None:
                    self._beside(engine, backend, precision, smaller)
                line.advance()
        if not any(lane.engine for lane in self.lanes):
            raise ConfigError("no back end could be built: " + "; ".join(str(one) for one in self.left_out))

    def _with_exits(self, backend: str, precision: str, most: int) -> Engine | None:
        try:
            engine = self._engine(self.sdn, self.policies[precision], backend, precision)
            engine.measure(self.example, powers_up_to(rows_at_a_time(engine.ready(self.example)[0], most)))
        except Exception as error:  # a run time may fail in any way, and the others are timed all the same
            self.left_out.append(LeftOut(backend, precision, "", _why(error)))
            return None
        self.lanes.append(Lane(backend, precision, EXITS, engine, engine))
        return engine

    def _beside(self, engine: Engine, backend: str, precision: str, smaller: bool) -> None:
        """What an engine is compared to in its own run time and precision."""
        if (backend, precision) != ("eager", "fp32"):
            self._without_exits(backend, precision, PLAIN)
        if backend == "onnx" and not {"spinning", "shared_pool"} & set(self.options.get(backend, {})):
            self._without_exits(backend, precision, SPINNING, spinning=True)
        last = self.sdn.num_exits - 1

        def nobody(inputs: Any) -> Answers:
            driver, values = engine.ready(inputs)
            return driver.answer(values, plan=np.full(len(next(iter(values.values()))), last))

        self._lane(backend, precision, NOBODY, lambda: nobody)

        def all_exits(inputs: Any) -> None:
            driver, values = engine.ready(inputs)
            driver.logits(values)

        self._lane(backend, precision, ALL_EXITS, lambda: all_exits)
        for exit in self._smaller_exits(backend, precision) if smaller else ():
            self._without_exits(backend, precision, static(exit), exit)

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

    def _without_exits(
        self, backend: str, precision: str, variant: str, exit: int | None = None, **options: Any
    ) -> None:
        """A lane of the network that ends at an exit, or of the whole one, nobody leaving before the end."""
        own = "plain" if backend == "eager" else backend

        def make() -> Engine:
            sdn = self.sdn if exit is None else ending_at(self.sdn, exit, exportable=backend != "eager")
            return self._engine(sdn, NO_EXITS, own, precision, **options)

        self._lane(backend, precision, variant, make)

    def _engine(self, sdn: ShallowDeepNetwork, policy: ExitPolicy, backend: str, precision: str, **more: Any) -> Engine:
        options = {**self.options.get(backend, {}), **more}
        if precision == "int8" and self.calibration is not None:
            options.setdefault("calibration", self.calibration)
        return Engine(sdn, policy, backend=backend, precision=precision, example_inputs=self.example, **options)

    def _lane(self, backend: str, precision: str, variant: str, make: Callable[[], Callable[[Any], Any]]) -> None:
        try:
            run = make()
            run(self.example)
        except Exception as error:  # as above
            self.left_out.append(LeftOut(backend, precision, variant, _why(error)))
        else:
            self.lanes.append(Lane(backend, precision, variant, run))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
