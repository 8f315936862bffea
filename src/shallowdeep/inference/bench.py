"""Early exits against not exiting, on the clock: every way to run a network is timed in turn on the same samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from shallowdeep.data.pytrees import row_counts, take_rows
from shallowdeep.errors import ConfigError, TraceError, UnknownName
from shallowdeep.inference.backends import BACKENDS, PRECISIONS, Driver
from shallowdeep.inference.engine import Engine
from shallowdeep.inference.runner import Answers, Latency, Leaving, collect
from shallowdeep.inference.speed import (
    ALL_EXITS,
    BOUND,
    EXITS,
    LINEAR,
    NOBODY,
    ONE_AT_A_TIME,
    PLAIN,
    SPINNING,
    STAGES,
    LeftOut,
    SpeedReport,
    Timing,
    static,
)
from shallowdeep.inference.stages import as_values, cut, thresholds_of
from shallowdeep.inference.torch_stages import TorchStages
from shallowdeep.networks.calls import first_line
from shallowdeep.networks.costs import Costs
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import tapped
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence, ExitPolicy, exits_of
from shallowdeep.progress import bar
from shallowdeep.traces.record import record
from shallowdeep.traces.trace import Trace

DEFAULT_BACKENDS = tuple(name for name in BACKENDS if name != "plain")
NO_EXITS = Confidence(2.0, exits=())  # everybody leaves at the end, with its softmax
ONLY_AS_ACCURATE = ("compiled",)  # takes so long to build that of the smaller networks only one is
TIE = 1e-5  # how far run times may lie apart by rounding
STAGE_BATCHES, STAGE_ROWS = 4, 64  # of a round, on which the stages alone are timed: so many batches or samples
VERSIONS = {"onnx": "onnxruntime", "openvino": "openvino"}


def measure_speed(
    sdn: ShallowDeepNetwork,
    policy: ExitPolicy | Mapping[str, ExitPolicy],
    images: Any,
    labels: Int[Tensor, " n"],
    *,
    batch_sizes: Sequence[int] = (1, 8, 32, 256),
    backends: Sequence[str] = DEFAULT_BACKENDS,
    precisions: Sequence[str] = ("fp32",),
    rounds: int = 10,
    num_samples: int | None = None,
    threads: int | None = None,
    smaller: bool = True,
    trace: Trace | None = None,
    calibration: Any = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = False,
) -> SpeedReport:
    """Time early exits against the same network without them, and against what else one might run.

    In every round everything is timed once, one after another, on the same samples; which comes first changes from
    round to round. Ratios within a round are what counts. ``VARIANTS`` in ``speed`` says what is timed.

    Args:
        sdn: trained, on the device to be timed on. Not changed.
        policy: when to stop; a mapping gives each precision its own, calibrated on a Trace of that precision.
        images: what the backbone takes, samples as rows: a tensor, or a tuple or mapping of tensors.
        labels: true classes.
        batch_sizes: samples come in batches of each of these, one batch after another.
        backends: of the engine. One that cannot be built is listed with the reason.
        precisions: of weights and arithmetic.
        rounds: times that each figure is taken; the samples are shared out among them.
        num_samples: at most so many are used; ``None``: all.
        threads: on the CPU; ``None``: as many as PyTorch has now.
        smaller: also time the networks that end at one exit.
        trace: of exactly these samples, to compare answers with; ``None``: it is recorded here.
        calibration: inputs on which ``"int8"`` is calibrated; no images of those that are timed.
        options: of each back end by name.
        progress: draw a bar on the terminal.

    Returns:
        Times, ratios and accuracies.

    Raises:
        UnknownName: there is no such back end or precision.
        ConfigError: an option is not usable, there are too few samples, or no back end can be built.
        TraceError: the Trace is of other samples.
    """
    images, labels = _some(images, labels, num_samples)
    _check(images, labels, batch_sizes, backends, precisions, rounds)
    policies = {one: policy[one] if isinstance(policy, Mapping) else policy for one in _known(policy, precisions)}
    with _threads(threads):
        trace = _trace(sdn, images, labels, trace)
        workshop = _Workshop(sdn, policies, take_rows(images, slice(0, 4)), trace, options or {}, calibration)
        workshop.build(backends, precisions, max(batch_sizes), smaller=smaller, progress=progress)
        timings: list[Timing] = []
        with bar("bench", rounds * len(batch_sizes), shown=progress) as line:
            for batch_size in batch_sizes:
                line.say(f"batch {batch_size}")
                timings += _Bench(workshop.lanes, images, batch_size, rounds).run(trace, policies, line.advance)
        num_threads = torch.get_num_threads()
    used = {name: version(package) for name, package in VERSIONS.items() if name in {t.backend for t in timings}}
    return SpeedReport(
        tuple(timings),
        tuple(workshop.left_out),
        {name: one.to_dict() for name, one in policies.items()},
        tuple(trace.correct.double().mean(0).tolist()),
        tuple(_alone(sdn.costs)),
        rounds,
        num_threads,
        str(next(sdn.parameters()).device),
        {"torch": torch.__version__, **used},
    )


def _some(images: Any, labels: Tensor, num_samples: int | None) -> tuple[Any, Tensor]:
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"a benchmark uses at least one sample, got num_samples={num_samples}.")
    return take_rows(images, slice(0, num_samples)), labels[:num_samples]


def _known(policy: ExitPolicy | Mapping[str, ExitPolicy], precisions: Sequence[str]) -> Sequence[str]:
    wanted = list(dict.fromkeys(["fp32", *precisions]))
    missing = [one for one in wanted if isinstance(policy, Mapping) and one not in policy]
    if missing:
        raise ConfigError(f"no policy for {', '.join(missing)}. Give one for each of {', '.join(wanted)}.")
    return wanted


def _check(
    images: Any,
    labels: Tensor,
    batch_sizes: Sequence[int],
    backends: Sequence[str],
    precisions: Sequence[str],
    rounds: int,
) -> None:
    for kind, names, known in (("back end", backends, BACKENDS), ("precision", precisions, PRECISIONS)):
        for name in names:
            if name not in known:
                raise UnknownName(kind, name, known)
    if "plain" in backends:
        raise ConfigError("'plain' is what every back end is compared to; name the back ends that leave early.")
    if not batch_sizes or min(batch_sizes) < 1 or rounds < 1 or not backends or not precisions:
        raise ConfigError(
            "a benchmark needs batch sizes and rounds of at least 1, a back end and a precision; got "
            f"batch_sizes={tuple(batch_sizes)}, rounds={rounds}, backends={tuple(backends)}, "
            f"precisions={tuple(precisions)}."
        )
    if row_counts(images) != {len(labels)}:
        raise ConfigError(f"there are {len(labels)} labels for inputs of {sorted(row_counts(images))} rows.")
    if len(labels) < max(batch_sizes):
        raise ConfigError(f"batches of {max(batch_sizes)} need as many samples at least, got {len(labels)}.")


def _trace(sdn: ShallowDeepNetwork, images: Any, labels: Tensor, trace: Trace | None) -> Trace:
    if trace is None:
        parts = [slice(first, first + 256) for first in range(0, len(labels), 256)]
        return record(sdn, [(take_rows(images, part), labels[part]) for part in parts])
    if trace.labels is None or trace.num_exits != sdn.num_exits or not torch.equal(trace.labels.cpu(), labels.cpu()):
        raise TraceError("the Trace is not of these samples and this network: its exits or labels differ.")
    return trace


def _alone(costs: Costs) -> list[float]:
    """What a network costs that ends at each exit, as a share of the plain one."""
    totals = np.add(costs.backbone_flops, costs.head_flops) / (costs.plain_flops or costs.backbone_flops[-1])
    return totals.tolist()


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    if number is not None and number < 1:
        raise ConfigError(f"a CPU runs at least one thread, got threads={number}.")
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Lane:
    """One thing to be timed; ``engine``: of one with exits, whose stages are timed as well."""

    backend: str
    precision: str
    variant: str
    run: Callable[[Any], Answers | None]
    engine: Engine | None = None


@dataclass
class _Workshop:
    """Builds what is to be timed, and notes what cannot be built."""

    sdn: ShallowDeepNetwork
    policies: Mapping[str, ExitPolicy]
    example: Any
    trace: Trace
    options: Mapping[str, Mapping[str, Any]]
    calibration: Any
    lanes: list[_Lane] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def build(
        self, backends: Sequence[str], precisions: Sequence[str], most: int, *, smaller: bool, progress: bool
    ) -> None:
        self._lane("eager", "fp32", PLAIN, lambda: self._engine(self.sdn, NO_EXITS, "plain", "fp32"))
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
            engine.measure(self.example, _powers(_most(engine.ready(self.example)[0], most)))
        except Exception as error:  # a run time may fail in any way, and the others are timed all the same
            self.left_out.append(LeftOut(backend, precision, "", _why(error)))
            return None
        self.lanes.append(_Lane(backend, precision, EXITS, engine, engine))
        return engine

    def _beside(self, engine: Engine, backend: str, precision: str, smaller: bool) -> None:
        """What an engine is compared to in its own run time and precision."""
        own = "plain" if backend == "eager" else backend
        if (backend, precision) != ("eager", "fp32"):
            self._lane(backend, precision, PLAIN, lambda: self._engine(self.sdn, NO_EXITS, own, precision))
        if backend == "onnx" and not {"spinning", "shared_pool"} & set(self.options.get(backend, {})):
            self._lane(
                backend, precision, SPINNING, lambda: self._engine(self.sdn, NO_EXITS, own, precision, spinning=True)
            )
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
            make = _exportable if backend not in ("eager",) else _truncated
            self._lane(
                backend,
                precision,
                static(exit),
                lambda exit=exit, make=make: self._engine(make(self.sdn, exit), NO_EXITS, own, precision),
            )

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
            self.lanes.append(_Lane(backend, precision, variant, run))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _most(driver: Driver, rows: int) -> int:
    """How many of some rows a driver runs at a time."""
    sizes = getattr(getattr(driver, "stages", None), "sizes", None)
    return min(limit for limit in (rows, driver.micro_batch, sizes[-1] if sizes else None) if limit)


def _powers(most: int) -> list[int]:
    """Powers of two up to a number, and that."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


class _UpTo(nn.Module):
    """A network that answers at one of its exits, as it can be exported: what lies behind is dead code there."""

    def __init__(self, sdn: ShallowDeepNetwork, exit: int):
        super().__init__()
        self.sdn, self.exit = sdn, exit

    def forward(self, *args: Any, **named: Any) -> Tensor:
        tap = self.sdn.taps[self.exit]
        with tapped(self.sdn.backbone, [tap]) as found:
            self.sdn.run_backbone(named or (args[0] if len(args) == 1 else args))
        return self.sdn.exits[self.exit](found[tap])


def _exportable(sdn: ShallowDeepNetwork, exit: int) -> ShallowDeepNetwork:
    return _without_exits(_UpTo(sdn, exit), sdn, exit)


def _truncated(sdn: ShallowDeepNetwork, exit: int) -> ShallowDeepNetwork:
    return _without_exits(sdn.truncate(exit), sdn, exit)


def _without_exits(net: nn.Module, sdn: ShallowDeepNetwork, exit: int) -> ShallowDeepNetwork:
    costs = sdn.costs
    own = Costs(
        (costs.backbone_flops[exit] + costs.head_flops[exit],),
        (0,),
        (costs.backbone_params[exit] + costs.head_params[exit],),
        (0,),
    )
    return ShallowDeepNetwork(net, [], [], own, label_spaces=sdn.label_spaces)


class OneAtATime:
    """Early exit as the paper's published code has it, in our own words: sample by sample, stage by stage.

    After each exit Python asks whether this one sample may leave. Each stage is a PyTorch module; nothing is
    folded or compiled.

    Args:
        sdn: the network.
        policy: when to stop.
        example: inputs as the network takes them.
    """

    def __init__(self, sdn: ShallowDeepNetwork, policy: ExitPolicy, example: Any):
        exits = exits_of(policy, sdn.num_exits)
        self.stages = TorchStages(cut(sdn, example, exits=exits, fold=False), policy, sdn.num_outputs)
        self.costs = sdn.costs.relative(exits[:-1])[exits].tolist()
        self.device = next(sdn.parameters()).device

    def __call__(self, inputs: Any) -> Answers:
        """Answer a batch, its samples one after another."""
        rows = {name: value.to(self.device).split(1) for name, value in as_values(inputs).items()}
        samples = [dict(zip(rows, sample, strict=True)) for sample in zip(*rows.values(), strict=True)]
        leaving = [self._answer(number, values) for number, values in enumerate(samples)]
        return collect(leaving, self.stages.exits, self.costs)

    def _answer(self, number: int, values: dict[str, Any]) -> Leaving:
        for stage, exit in enumerate(self.stages.exits):
            step = self.stages.run(stage, values)
            if exit == self.stages.exits[-1] or bool(step.stop[0]):
                return Leaving(exit, np.array([number]), step.scores.cpu().numpy())
            values = step.values
        raise AssertionError("the last exit answers")


@dataclass
class _Tally:
    """What one lane took and answered at one batch size."""

    labels: np.ndarray
    exits: np.ndarray
    costs: np.ndarray
    latencies_ms: list[float] = field(default_factory=list)

    def note(self, rows: np.ndarray, answers: Answers) -> None:
        self.labels[rows], self.exits[rows], self.costs[rows] = answers.labels, answers.exits, answers.costs


class _Bench:
    """All lanes at one batch size."""

    def __init__(self, lanes: Sequence[_Lane], images: Any, batch_size: int, rounds: int):
        self.lanes, self.images, self.batch_size, self.rounds = lanes, images, batch_size, rounds
        self.num_samples = next(iter(row_counts(images)))
        self.batches = max(1, self.num_samples // (rounds * batch_size))  # of a round
        self.timed = max(STAGE_BATCHES, STAGE_ROWS // batch_size)  # of these, for the stages alone
        none = np.full(self.num_samples, -1)
        self.tallies = [_Tally(none.copy(), none.copy(), np.zeros(self.num_samples)) for _ in lanes]
        self.stages_ms: dict[int, dict[str, list[float]]] = {
            place: {BOUND: [], LINEAR: [], STAGES: []} for place, lane in enumerate(lanes) if lane.engine
        }

    def run(self, trace: Trace, policies: Mapping[str, ExitPolicy], advance: Callable[[], None]) -> list[Timing]:
        first = take_rows(self.images, slice(0, self.batch_size))
        for lane in self.lanes:
            lane.run(first)
        for number in range(self.rounds):
            self._round(number)
            advance()
        return list(self._timings(trace, policies))

    def _rows(self, number: int) -> list[np.ndarray]:
        """Which samples are in each batch of a round; from the end it goes on at the beginning."""
        start = number * self.batches * self.batch_size
        rows = (start + np.arange(self.batches * self.batch_size)) % self.num_samples
        return list(rows.reshape(self.batches, self.batch_size))

    def _round(self, number: int) -> None:
        rows = self._rows(number)
        batches = [take_rows(self.images, torch.from_numpy(part)) for part in rows]
        shift = number % len(self.lanes)
        order = list(range(len(self.lanes)))
        for place in order[shift:] + order[:shift]:
            run, tally = self.lanes[place].run, self.tallies[place]
            begin = time.perf_counter()
            found = [run(batch) for batch in batches]
            tally.latencies_ms.append(1e3 * (time.perf_counter() - begin) / len(batches))
            for part, answers in zip(rows, found, strict=True):
                if answers is not None:
                    tally.note(part, answers)
            engine = self.lanes[place].engine
            if engine is not None:
                exits = [answers.exits for answers in found[: self.timed] if answers is not None]
                for name, value in stage_times(engine, batches[: self.timed], exits).items():
                    self.stages_ms[place][name].append(value)

    def _timings(self, trace: Trace, policies: Mapping[str, ExitPolicy]) -> Iterator[Timing]:
        for place, (lane, tally) in enumerate(zip(self.lanes, self.tallies, strict=True)):
            key = (self.batch_size, lane.backend, lane.precision)
            found = _answered(tally, trace)
            if lane.variant == EXITS and lane.precision == "fp32":
                found |= agreement(tally.labels, tally.exits, trace, policies["fp32"])
            elif lane.variant not in (EXITS, ONE_AT_A_TIME):  # no policy decides there
                found = {name: found[name] for name in ("n", "accuracy") if name in found}
            yield Timing(*key, lane.variant, tuple(tally.latencies_ms), **found)
            for variant, values in self.stages_ms.get(place, {}).items():
                yield Timing(*key, variant, tuple(values))


def _answered(tally: _Tally, trace: Trace) -> dict[str, Any]:
    done = tally.labels >= 0
    if not done.any() or trace.labels is None:
        return {}
    shares = np.bincount(tally.exits[done], minlength=trace.num_exits) / done.sum()
    return {
        "n": int(done.sum()),
        "accuracy": float((tally.labels == trace.labels.numpy())[done].mean()),
        "cost": float(tally.costs[done].mean()),
        "exit_shares": tuple(shares.tolist()),
    }


def stage_times(engine: Engine, batches: Sequence[Any], exits: Sequence[np.ndarray]) -> dict[str, float]:
    """What an engine's stages take by themselves for some batches, in milliseconds a batch.

    Every batch is timed once, and the mean is taken as it is of the engine's own calls: a median of short times would
    leave out a busy machine's pauses that the engine's mean holds.

    Args:
        engine: its stages are timed now.
        batches: of one size.
        exits: where the samples of each batch leave.

    Returns:
        ``BOUND``, ``LINEAR`` and ``STAGES``. Where the engine runs micro-batches, so are the stages timed.
    """
    found: dict[str, list[float]] = {BOUND: [], LINEAR: [], STAGES: []}
    for inputs, left in zip(batches, exits, strict=True):
        (driver, values), total = engine.ready(inputs), len(left)
        most = _most(driver, total)
        arriving = [int((left >= exit).sum()) for exit in engine.exits]
        sizes = {rows % most for rows in arriving} - {0} | {most}
        latency = driver.measure(values, sorted(sizes), repeats=1)
        full = [_stage_ms(latency, stage, total, most) for stage in range(len(arriving))]
        found[BOUND].append(sum(_stage_ms(latency, stage, rows, most) for stage, rows in enumerate(arriving)))
        found[LINEAR].append(sum(full[stage] * rows / total for stage, rows in enumerate(arriving)))
        found[STAGES].append(sum(full))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _stage_ms(latency: Latency, stage: int, rows: int, most: int) -> float:
    """Of a stage on some rows, run ``most`` at a time."""
    whole, rest = divmod(rows, most)
    return whole * latency.run(stage, most) + (latency.run(stage, rest) if rest else 0.0)


def agreement(labels: np.ndarray, exits: np.ndarray, trace: Trace, policy: ExitPolicy) -> dict[str, int]:
    """Answers that are not the replay's, and how many of them rounding explains.

    A tie is a sample whose answer is the replay's after a threshold moved by ``TIE``, or whose two largest
    probabilities lie that near at the exit it left at.

    Args:
        labels: answered, -1 where there is no answer.
        exits: where each sample left.
        trace: of the same samples, fp32.
        policy: that decided.

    Returns:
        ``differing`` and, of those, ``ties``.
    """
    expected = replay(trace, policy)
    differ = (labels >= 0) & _unlike(labels, exits, expected)
    tied = np.zeros(len(labels), dtype=bool)
    for nudged in _nudged(policy):
        tied |= ~_unlike(labels, exits, replay(trace, nudged))
    top = torch.stack([logits.softmax(-1).topk(min(2, logits.shape[1])).values for logits in trace.logits])
    gaps = (top[..., 0] - top[..., -1]).numpy()
    tied |= (gaps < TIE)[np.minimum(np.maximum(exits, 0), expected.exits.numpy()), np.arange(len(labels))]
    return {"differing": int(differ.sum()), "ties": int((differ & tied).sum())}


def _unlike(labels: np.ndarray, exits: np.ndarray, expected: Any) -> np.ndarray:
    return (labels != expected.predictions.numpy()) | (exits != expected.exits.numpy())


def _nudged(policy: ExitPolicy) -> Iterator[ExitPolicy]:
    for name, number in thresholds_of(policy).items():
        for step in (-TIE, TIE) if isinstance(number, float) else ():
            try:
                yield dataclasses.replace(policy, **{name: number + step})  # type: ignore[type-var]
            except ConfigError:  # it lies at the edge of what a threshold may be
                continue
