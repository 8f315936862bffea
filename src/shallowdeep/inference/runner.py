"""Run an exported Shallow-Deep Network stage by stage, and let every sample leave as soon as it may.

This one file needs numpy and onnxruntime alone: every exported folder holds a copy of it as ``run.py``.

    python run.py images.npy --out answers.npz
    python run.py --bench

The first half, down to ``Cascade``, knows no run time at all and drives the stages of every back end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

Values = dict[str, Any]
"""What goes from stage to stage: name to array, one row per sample, in arrays of the run time's own kind."""

MAX_WAIT = 8  # batches after which a sample waits no longer for others

DONE = -1  # the id of a row whose sample has its answer, or that only fills a batch up


@dataclass(frozen=True)
class Answers:
    """What was answered, one entry per sample.

    Attributes:
        ids: which samples these are, shape ``(n,)``: their numbers in the order in which they were given.
        labels: the answered class, shape ``(n,)``.
        scores: probabilities, shape ``(n, outputs)``.
        confidences: the largest of them, shape ``(n,)``.
        exits: where each sample left, shape ``(n,)``.
        costs: what that cost, as a share of the plain network, shape ``(n,)``.
    """

    ids: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    confidences: np.ndarray
    exits: np.ndarray
    costs: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def updated(self, later: Answers) -> Answers:
        """These answers, with later ones in the place of their samples' earlier ones; both in the order of ids."""
        places = np.searchsorted(self.ids, later.ids)
        merged = {name: getattr(self, name).copy() for name in ("labels", "scores", "confidences", "exits", "costs")}
        for name, values in merged.items():
            values[places] = getattr(later, name)
        return Answers(self.ids, **merged)

    def __str__(self) -> str:
        shares = {int(exit): float((self.exits == exit).mean()) for exit in np.unique(self.exits)}
        listed = ", ".join(f"exit {exit} {100 * share:.0f} %" for exit, share in shares.items())
        return f"{len(self)} answers at {100 * self.costs.mean():.1f} % of the cost ({listed})"


class Leaving(NamedTuple):
    """Samples that leave at one exit: their ids ``(n,)``, the scores they are answered with ``(n, outputs)``."""

    exit: int
    ids: np.ndarray
    scores: np.ndarray


class Step(NamedTuple):
    """What a stage gives: the next stage's values, who may stop ``(rows,)``, scores and logits ``(rows, outputs)``."""

    values: Values
    stop: Any
    scores: Any
    logits: Any


@runtime_checkable
class Stages(Protocol):
    """A network in pieces, each ending at an exit, in some run time."""

    @property
    def exits(self) -> Sequence[int]:
        """Index of the exit that each stage ends at."""
        ...

    @property
    def sizes(self) -> Sequence[int] | None:
        """Batch sizes the stages can be run at, rising; ``None``: any."""
        ...

    def run(self, stage: int, values: Values) -> Step:
        """Run one stage on at least one row."""
        ...

    def fetch(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """A step's ``stop`` and ``scores`` as numpy arrays, after one synchronisation."""
        ...

    def take(self, values: Values, rows: np.ndarray) -> Values:
        """Some rows of every value, by index; an index may repeat."""
        ...

    def join(self, parts: Sequence[Values]) -> Values:
        """The rows of several values, one after another."""
        ...

    def wait(self) -> None:
        """Wait until the device has done all that it was asked for."""
        ...


@dataclass(frozen=True)
class Latency:
    """How long each stage takes, by batch size.

    Attributes:
        sizes: the batch sizes measured, rising.
        run_ms: of each stage at each size.
        take_ms: of picking so many rows of what goes into each stage.
    """

    sizes: tuple[int, ...]
    run_ms: tuple[tuple[float, ...], ...]
    take_ms: tuple[tuple[float, ...], ...]

    def run(self, stage: int, rows: int) -> float:
        """Milliseconds of a stage on some rows: a straight line between two sizes and beyond the last."""
        return _along(rows, self.sizes, self.run_ms[stage])

    def take(self, stage: int, rows: int) -> float:
        """Milliseconds of picking some rows of what goes into a stage."""
        return _along(rows, self.sizes, self.take_ms[stage])

    def bound(self, arriving: Sequence[int]) -> float:
        """Milliseconds of all stages at the rows that arrive at each: what no engine on these stages can beat."""
        return sum(self.run(stage, rows) for stage, rows in enumerate(arriving) if rows)


def _along(rows: int, sizes: Sequence[int], values: Sequence[float]) -> float:
    if rows <= sizes[-1]:
        return float(np.interp(rows, sizes, values))
    if len(sizes) == 1:
        return values[0] * rows / sizes[0]
    slope = max(values[-1] - values[-2], 0.0) / (sizes[-1] - sizes[-2])
    return values[-1] + slope * (rows - sizes[-1])


@dataclass
class _Group:
    """Rows that go through a stage together; ``ids`` says whose they are."""

    ids: np.ndarray
    values: Values
    batch: int = 0  # the number of the oldest batch they come from

    @property
    def live(self) -> np.ndarray:
        return live_rows(self.ids)


_Waits = Callable[[int, list[_Group]], bool]


@dataclass(frozen=True)
class Cascade:
    """Runs stages on batches, and lets each sample leave where its policy says so.

    Finished rows are dropped where that pays by the measured ``latency`` (always where there is none) and
    carried along where it does not; a carried row's answer is fixed. No stage is ever run on no row.

    Args:
        stages: the network in pieces.
        costs: of leaving at each stage's exit, as a share of the plain network.
        latency: measured; ``None``: dropping is taken to pay always.
        micro_batch: rows run at a time; ``None``: all that come together.
    """

    stages: Stages
    costs: Sequence[float]
    latency: Latency | None = None
    micro_batch: int | None = None

    @property
    def exits(self) -> Sequence[int]:
        """Index of the exit that each stage ends at."""
        return self.stages.exits

    def answer(self, inputs: Values, *, plan: np.ndarray | None = None) -> Answers:
        """Answer a batch of any size.

        Args:
            inputs: rows first.
            plan: the exit of each sample, in place of the policy's decisions: to time an engine.

        Returns:
            The answers, in the order of the inputs.
        """
        waiting: list[list[_Group]] = [[] for _ in self.stages.exits]
        found: list[Leaving] = []
        for group in self._split([inputs]):
            waiting[0].append(group)
            found += self._drain(waiting, plan, lambda stage, groups: self._waits(stage, groups, self.micro_batch))
        found += self._drain(waiting, plan)
        return collect(found, self.stages.exits, self.costs)

    def stream(
        self, batches: Iterable[Values], *, refill: bool = False, plan: np.ndarray | None = None
    ) -> Iterator[Leaving]:
        """Hand samples out when they leave.

        Args:
            batches: of inputs.
            refill: let the survivors of several batches wait at a stage for each other, where running them
                together pays by the measured ``latency``, new samples at the first stage among them; none waits for
                more than ``MAX_WAIT`` batches, but as long as those take to come. When the next batch cannot be read,
                those who wait are answered first.
            plan: as for ``answer``.
        """
        waiting: list[list[_Group]] = [[] for _ in self.stages.exits]
        full, number = self.micro_batch, 0

        def waits(stage: int, groups: list[_Group]) -> bool:
            late = number - groups[0].batch >= MAX_WAIT
            return self.latency is not None and not late and self._waits(stage, groups, full)

        try:
            for group in self._split(batches, own=refill):
                full, number = full or len(group.ids), group.batch
                waiting[0].append(group)
                yield from self._drain(waiting, plan, waits if refill else None)
        except Exception:
            yield from self._drain(waiting, plan)
            raise
        yield from self._drain(waiting, plan)

    def logits(self, inputs: Values) -> list[np.ndarray]:
        """Logits ``(n, outputs)`` at each stage's exit, nobody leaving."""
        found: list[list[np.ndarray]] = [[] for _ in self.stages.exits]
        for group in self._split([inputs]):
            for stage, store in enumerate(found):
                group = self._fitted(stage, group)
                step = self.stages.run(stage, group.values)
                store.append(np.asarray(step.logits.cpu() if hasattr(step.logits, "cpu") else step.logits)[group.live])
                group = _Group(group.ids, step.values)
        return [np.concatenate(store) for store in found]

    def measure(self, inputs: Values, sizes: Iterable[int], *, repeats: int) -> Latency:
        """Time every stage on batches made of the inputs' rows; the median of some repeats counts.

        Sizes are gone through in turn, so that a slower moment of the machine meets all of them.
        """
        sizes = sorted({self._size(size) for size in sizes})
        rows = len(next(iter(inputs.values())))
        takes, runs = np.zeros((2, repeats + 1, len(self.stages.exits), len(sizes)))
        for repeat in range(repeats + 1):  # the first one is not counted: it allocates, and may compile
            for place, size in enumerate(sizes):
                values, picked = inputs, np.arange(size) % rows
                for stage in range(len(self.stages.exits)):
                    begin = time.perf_counter()
                    values = self.stages.take(values, picked)
                    self.stages.wait()
                    taken = time.perf_counter()
                    step = self.stages.run(stage, values)
                    self.stages.fetch(step)
                    takes[repeat, stage, place] = 1e3 * (taken - begin)
                    runs[repeat, stage, place] = 1e3 * (time.perf_counter() - taken)
                    values, picked = step.values, np.arange(size)
        run_ms, take_ms = np.median(runs[1:], axis=0).tolist(), np.median(takes[1:], axis=0).tolist()
        return Latency(tuple(sizes), tuple(map(tuple, run_ms)), tuple(map(tuple, take_ms)))

    def anytime(self, inputs: Values) -> Iterator[Leaving]:
        """What would be answered at each exit, for everyone still in the network there, exit by exit."""
        groups = list(self._split([inputs]))
        for stage, exit in enumerate(self.stages.exits):
            going_on, found = [], []
            for group in (self._fitted(stage, group) for group in groups):
                step = self.stages.run(stage, group.values)
                stop, scores = self.stages.fetch(step)
                live = group.live
                found.append((group.ids[live], scores[live]))
                ids = np.where(stop, DONE, group.ids)
                if (ids != DONE).any():
                    going_on.append(_Group(ids, step.values))
            yield Leaving(exit, np.concatenate([ids for ids, _ in found]), np.concatenate([s for _, s in found]))
            groups = going_on
            if not groups:
                return

    def _split(self, batches: Iterable[Values], *, own: bool = False) -> Iterator[_Group]:
        """Batches as groups of at most ``micro_batch`` rows, numbered on; ``own``: as copies, for rows that wait."""
        start = 0
        for number, values in enumerate(batches):
            rows = len(next(iter(values.values())))
            values = self.stages.take(values, np.arange(rows)) if own else values
            ids = np.arange(start, start + rows)
            most = self._most(rows)
            for first in range(0, rows, most):
                part = slice(first, first + most)
                some = values if rows <= most else {name: v[part] for name, v in values.items()}
                yield _Group(ids[part], some, number)
            start += rows

    def _most(self, rows: int) -> int:
        """How many rows may be run at a time, of some that are there."""
        limits = [rows, self.micro_batch, self.stages.sizes[-1] if self.stages.sizes else None]
        return min(limit for limit in limits if limit)

    def _drain(
        self, waiting: list[list[_Group]], plan: np.ndarray | None, waits: _Waits | None = None
    ) -> Iterator[Leaving]:
        # From shallow to deep: what comes out of one stage may make the next one's batch full.
        for stage, groups in enumerate(waiting):
            while groups and not (waits is not None and waits(stage, groups)):
                leaving, rest = self._advance(stage, self._picked(stage, groups), plan)
                if len(leaving.ids):
                    yield leaving
                if rest is not None:
                    waiting[stage + 1].append(rest)

    def _waits(self, stage: int, groups: list[_Group], full: int | None) -> bool:
        """Whether some rows shall wait for a batch of ``full``: a row is cheaper there, by more than the noise."""
        rows = sum(len(group.live) for group in groups)
        if full is None or rows >= full:
            return False
        if self.latency is None:
            return True
        alone = self.latency.run(stage, self._size(rows)) / rows
        return alone > 1.05 * self.latency.run(stage, self._size(full)) / full

    def _picked(self, stage: int, groups: list[_Group]) -> _Group:
        """Takes out of a stage's queue what shall be run now: as many rows as may be run at a time."""
        most = self._most(sum(len(group.live) for group in groups))
        if len(groups) == 1 and len(groups[0].live) <= most:
            return self._fitted(stage, groups.pop())
        picked, count = [], 0
        while groups and count < most:
            group = groups.pop(0)
            live = group.live
            now, later = live[: most - count], live[most - count :]
            if len(later):
                groups.insert(0, replace(group, ids=group.ids[later], values=self.stages.take(group.values, later)))
            whole = len(now) == len(group.ids)
            picked.append(
                group if whole else replace(group, ids=group.ids[now], values=self.stages.take(group.values, now))
            )
            count += len(now)
        values = self.stages.join([group.values for group in picked])
        return self._fitted(stage, _Group(np.concatenate([group.ids for group in picked]), values, picked[0].batch))

    def _fitted(self, stage: int, group: _Group) -> _Group:
        """A group in a batch that the stage can be run at, without its finished rows where dropping them pays."""
        live = group.live
        size = self._size(len(live))
        if size == len(group.ids) or (
            len(live) < len(group.ids) and not pays(self.latency, stage, size, len(group.ids))
        ):
            return group
        rows = np.concatenate([live, np.full(size - len(live), live[0])])
        ids = np.concatenate([group.ids[live], np.full(size - len(live), DONE)])
        return _Group(ids, self.stages.take(group.values, rows), group.batch)

    def _size(self, rows: int) -> int:
        if not self.stages.sizes:
            return rows
        return next((size for size in self.stages.sizes if size >= rows), self.stages.sizes[-1])

    def _advance(self, stage: int, group: _Group, plan: np.ndarray | None) -> tuple[Leaving, _Group | None]:
        """Run a stage: who leaves, and who goes on."""
        step = self.stages.run(stage, group.values)
        stop, scores = self.stages.fetch(step)
        exit = self.stages.exits[stage]
        leaving, ids = settle(group.ids, stop, scores, exit, last=stage == len(self.stages.exits) - 1, plan=plan)
        return leaving, _Group(ids, step.values, group.batch) if (ids != DONE).any() else None


def settle(
    ids: np.ndarray, stop: np.ndarray, scores: np.ndarray, exit: int, *, last: bool, plan: np.ndarray | None = None
) -> tuple[Leaving, np.ndarray]:
    """Who leaves at an exit.

    Args:
        ids: whose each row is, ``DONE`` where it is nobody's any more.
        stop: what the policy says of each row.
        scores: what each row would be answered.
        exit: index of the exit.
        last: everyone leaves here.
        plan: the exit of each sample by its id, in place of ``stop``.

    Returns:
        Those who leave, and the ids with theirs set to ``DONE``.
    """
    live = ids != DONE
    if plan is not None:
        stop = plan[ids] <= exit
    leaving = live if last else live & stop
    return Leaving(exit, ids[leaving], scores[leaving]), np.where(leaving, DONE, ids)


def live_rows(ids: np.ndarray) -> np.ndarray:
    """Indices of the rows that still want an answer."""
    return np.flatnonzero(ids != DONE)


def pays(latency: Latency | None, stage: int, kept: int, rows: int) -> bool:
    """Whether a stage is reached and run sooner with ``kept`` rows picked out of ``rows``; without a table it is."""
    if latency is None:
        return True
    return latency.take(stage, kept) + latency.run(stage, kept) < latency.run(stage, rows)


def collect(leaving: Iterable[Leaving], exits: Sequence[int], costs: Sequence[float]) -> Answers:
    """All that leaves, as one ``Answers`` in the order of the samples.

    Args:
        leaving: at least one.
        exits: index of each exit where samples may leave.
        costs: of leaving there.
    """
    found = list(leaving)
    ids = np.concatenate([one.ids for one in found])
    order = np.argsort(ids, kind="stable")
    left = np.concatenate([np.full(len(one.ids), one.exit) for one in found])[order]
    scores = np.concatenate([one.scores for one in found])[order]
    paid = np.asarray(costs, dtype=np.float64)[np.searchsorted(np.asarray(exits), left)]
    return Answers(ids[order], scores.argmax(-1), scores, scores.max(-1), left, paid)


# ---------------------------------------------------------------------------------------- ONNX Runtime

FORMAT = 1  # of the exported folder; raised when an older runner could no longer understand it
MANIFEST = "manifest.json"
FORMS = ("stages", "single", "batched")
OUT = "_out"  # what a stage gives to a later one is named as it is there, with this behind it
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""Providers on which features stay on the device from stage to stage; with others they pass through numpy."""
EXACT = {"CUDAExecutionProvider": {"use_tf32": 0}}
MOVERS: dict[str, str] = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
"""Who picks and joins rows on a kind of device; TensorRT would build an engine for every number of them."""

Provider = str | tuple[str, dict[str, Any]]


class RunnerError(ValueError):
    """An exported folder, or what it was given, is not usable."""


@dataclass(frozen=True)
class Settings:
    """How ONNX Runtime shall run.

    Args:
        threads: that share the work of one operator; 0: one for each core.
        providers: by name, or name and options; the first has to be there.
        spinning: threads without work wait actively. Faster alone on a machine, and a brake on everything else.
        shared_pool: all sessions share ONNX Runtime's global threads, as many as the first of them asked for. It is
            for the whole process: every session made later must say so as well. The fastest for programs that do
            nothing else.
        device_id: number of the GPU, for providers whose own options do not say it.
    """

    threads: int = 0
    providers: tuple[Provider, ...] = ("CPUExecutionProvider",)
    spinning: bool = False
    shared_pool: bool = False
    device_id: int = 0

    @property
    def numbered(self) -> list[Provider]:
        """The providers; those of a GPU with its number, and without TF32, which they would take for float32."""
        pairs = [(one, {}) if isinstance(one, str) else one for one in self.providers]
        return [
            (name, {"device_id": self.device_id, **EXACT.get(name, {}), **options}) if name in DEVICES else one
            for one, (name, options) in zip(self.providers, pairs, strict=True)
        ]

    @property
    def device(self) -> Device | None:
        """Where features stay from stage to stage under the first provider; ``None``: they are numpy's."""
        first = self.numbered[0]
        if isinstance(first, str) or first[0] not in DEVICES:
            return None
        return Device(DEVICES[first[0]], int(first[1]["device_id"]), self)

    def open(self, model: str | Path | bytes, name: str) -> Any:
        """A session.

        Args:
            model: its file, or its bytes.
            name: of the model, for messages.

        Raises:
            RunnerError: ONNX Runtime, or a provider, is not there or does not take the model.
        """
        runtime = _onnxruntime()
        asked = [one if isinstance(one, str) else one[0] for one in self.providers]
        unknown = [one for one in asked if one not in runtime.get_available_providers()]
        if unknown or not asked:
            there = ", ".join(runtime.get_available_providers())
            raise RunnerError(f"no provider {', '.join(unknown) or 'is named'}. This onnxruntime has: {there}.")
        if self.device_id < 0:
            raise RunnerError(f"devices are numbered from 0 on, got device_id={self.device_id}.")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if self.shared_pool:
            # Threads that are there already stay as they are: whoever came first has chosen how many.
            with contextlib.suppress(runtime.capi.onnxruntime_pybind11_state.Fail):
                runtime.set_global_thread_pool_sizes(self.threads, 1)
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        try:
            source = model if isinstance(model, bytes) else str(model)
            session = runtime.InferenceSession(source, options, providers=self.numbered)
        except Exception as error:  # whatever a damaged or too new model makes of being read
            why = " ".join(str(error).split())[-300:]  # what is wrong comes last, behind where that was found
            raise RunnerError(f"onnxruntime {runtime.__version__} does not open {name}: {why}") from error
        if asked[0] not in session.get_providers():
            raise RunnerError(f"{asked[0]} does not start; onnxruntime would run {name} on {session.get_providers()}.")
        return session


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RunnerError(f"this needs onnxruntime ({error}). Install it with: pip install onnxruntime") from error
    return onnxruntime


@dataclass(frozen=True)
class Device:
    """Arrays of ONNX Runtime on a device, and what is done with their rows there.

    ONNX Runtime has no operation outside a graph, so picking and joining rows are sessions of one node each, made
    when they are first wanted.

    Args:
        kind: as ONNX Runtime calls it, a key of ``MOVERS``.
        index: of several of a kind.
        settings: of the sessions; their providers do not count.
    """

    kind: str
    index: int
    settings: Settings
    _sessions: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def hold(self, value: Any) -> Any:
        """An array of numpy's as one on the device; one that is there already as it is."""
        if not isinstance(value, np.ndarray):
            return value
        return _onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), self.kind, self.index)

    def run(self, session: Any, names: Sequence[str], feeds: Values, staying: Callable[[str], bool]) -> list[Any]:
        """A session's outputs by name: of some that stay on the device, of others as numpy's."""
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, self.hold(value))
        for name in names:
            binding.bind_output(name, *((self.kind, self.index) if staying(name) else ("cpu",)))
        session.run_with_iobinding(binding)
        return [v if staying(n) else v.numpy() for n, v in zip(names, binding.get_outputs(), strict=True)]

    def take(self, value: Any, rows: np.ndarray) -> Any:
        """Some rows of an array, by index."""
        return self._move("Gather", [value, rows.astype(np.int64)])

    def join(self, values: Sequence[Any]) -> Any:
        """The rows of several arrays, one after another."""
        return self._move("Concat", values)

    def _move(self, kind: str, values: Sequence[Any]) -> Any:
        held = [self.hold(value) for value in values]
        types = tuple(value.data_type() for value in held)
        if (kind, types) not in self._sessions:
            own = replace(self.settings, providers=(MOVERS[self.kind],), device_id=self.index)
            self._sessions[kind, types] = own.open(one_node(kind, types), kind)
        feeds = {f"in_{place}": value for place, value in enumerate(held)}
        return self.run(self._sessions[kind, types], ["out"], feeds, lambda name: True)[0]


def take_rows(values: Values, rows: np.ndarray, device: Device | None = None) -> Values:
    """Some rows of every value, by index: of numpy's arrays here, of others on their device."""
    return {
        name: value[rows] if device is None or isinstance(value, np.ndarray) else device.take(value, rows)
        for name, value in values.items()
    }


def join_rows(parts: Sequence[Values], device: Device | None = None) -> Values:
    """The rows of several values, one after another: of numpy's arrays here, of others on their device."""
    joined: Values = {}
    for name, first in parts[0].items():
        some = [part[name] for part in parts]
        joined[name] = np.concatenate(some) if device is None or isinstance(first, np.ndarray) else device.join(some)
    return joined


ELEMENTS = {"float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9}
ELEMENTS |= {"float16": 10, "double": 11, "uint32": 12, "uint64": 13, "bfloat16": 16}
"""ONNX's numbers of types of elements."""


def one_node(kind: str, types: Sequence[str]) -> bytes:
    """An ONNX file of one node that works along the first axis, written without the onnx package.

    Args:
        kind: of node: ``"Gather"`` or ``"Concat"``.
        types: of its inputs ``"in_0"``, …, as ONNX Runtime calls them; ``"out"`` is of the first one's.

    The numbers are those of the fields in ``onnx.proto``.
    """
    names = [f"in_{place}" for place in range(len(types))]
    axis = _field(1, "axis") + _field(3, 0) + _field(20, 2)  # name, value, and that it is a whole number
    node = b"".join(_field(1, name) for name in names) + _field(2, "out") + _field(4, kind) + _field(5, axis)
    graph = _field(1, node) + _field(2, kind)
    for place, name, type in [*((11, *pair) for pair in zip(names, types, strict=True)), (12, "out", types[0])]:
        element = ELEMENTS[type.removeprefix("tensor(").removesuffix(")")]
        graph += _field(place, _field(1, name) + _field(2, _field(1, _field(1, element))))  # of any shape
    return _field(1, 8) + _field(8, _field(1, "") + _field(2, 13)) + _field(7, graph)  # IR version, opset, graph


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


class OnnxStages:
    """The stages of a network in ONNX Runtime, a session each (see ``Stages``).

    On a GPU features stay there from stage to stage, also where rows are dropped or joined.

    Args:
        models: shallow to deep, each a file or its bytes.
        exits: index of the exit that each ends at.
        thresholds: the policy's numbers by name.
        settings: of every session.
    """

    sizes: Sequence[int] | None = None

    def __init__(
        self,
        models: Sequence[str | Path | bytes],
        exits: Sequence[int],
        thresholds: Mapping[str, float | int] | None = None,
        settings: Settings | None = None,
    ):
        settings = settings or Settings()
        self.exits = list(exits)
        self.sessions = [
            settings.open(model, f"stage {place}" if isinstance(model, bytes) else Path(model).name)
            for place, model in enumerate(models)
        ]
        self.device = settings.device
        self._inputs = [[value.name for value in session.get_inputs()] for session in self.sessions]
        self._outputs = [[value.name for value in session.get_outputs()] for session in self.sessions]
        self._wanted = [
            {name for later in self._inputs[place + 1 :] for name in later} for place in range(len(self.sessions))
        ]
        self._thresholds = typed_thresholds(self.sessions[0], thresholds or {})

    def with_thresholds(self, thresholds: Mapping[str, float | int]) -> OnnxStages:
        """The same sessions with other numbers for the policy."""
        other = copy.copy(self)
        other._thresholds = {**self._thresholds, **typed_thresholds(self.sessions[0], thresholds)}
        return other

    def run(self, stage: int, values: Values) -> Step:
        """Run one stage on at least one row."""
        session, names, device = self.sessions[stage], self._outputs[stage], self.device
        if device is not None:  # what later stages want too goes there once
            values = {name: device.hold(v) if name in self._wanted[stage] else v for name, v in values.items()}
        feeds = {name: self._thresholds.get(name, values.get(name)) for name in self._inputs[stage]}
        if device is None:
            outputs = session.run(names, feeds)
        else:
            outputs = device.run(session, names, feeds, lambda name: name.endswith(OUT))
        found = dict(zip(names, outputs, strict=True))
        given = {name.removesuffix(OUT): value for name, value in found.items() if name.endswith(OUT)}
        kept = {name: value for name, value in values.items() if name in self._wanted[stage]}
        return Step({**kept, **given}, found["stop"], found["scores"], found["logits"])

    def fetch(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """``stop`` and ``scores``, which are on the host already."""
        return step.stop, step.scores

    def take(self, values: Values, rows: np.ndarray) -> Values:
        """Some rows of every value, by index."""
        return take_rows(values, rows, self.device)

    def join(self, parts: Sequence[Values]) -> Values:
        """The rows of several values, one after another."""
        return join_rows(parts, self.device)

    def wait(self) -> None:
        """Nothing is left to wait for: a session's run returns when its device is done."""


def typed_thresholds(session: Any, thresholds: Mapping[str, float | int]) -> Values:
    """A policy's numbers as a session's inputs want them.

    Raises:
        RunnerError: the session has no input of a name, or a number is none that its type holds.
    """
    kinds = {value.name: value.type for value in session.get_inputs() if not value.shape}
    found: Values = {}
    for name, number in thresholds.items():
        if name not in kinds:
            known = f"It has: {', '.join(kinds)}." if kinds else "It has none."
            raise RunnerError(f"the policy has no number named '{name}'. {known}")
        whole = kinds[name] == "tensor(int64)"
        if isinstance(number, bool) or not math.isfinite(number) or (whole and number != int(number)):
            raise RunnerError(f"{name} is {'a whole number' if whole else 'a finite number'}, got {number}.")
        found[name] = np.array(number, dtype=np.int64 if whole else np.float32)
    return found


@dataclass(frozen=True)
class OneFile:
    """A self-exiting file: all stages and the policy in one graph.

    Args:
        session: that runs it.
        exits: index of each exit where samples may leave.
        costs: of leaving there.
        thresholds: the policy's numbers, as the session takes them.
        rows: run at a time; the single file takes one.
    """

    session: Any
    exits: Sequence[int]
    costs: Sequence[float]
    thresholds: Values
    rows: int

    def answer(self, inputs: Values) -> Answers:
        """Answer a batch of any size."""
        return collect(self.stream([inputs]), self.exits, self.costs)

    def stream(self, batches: Iterable[Values]) -> Iterator[Leaving]:
        """Hand samples out as they are answered, a run of the file at a time."""
        start = 0
        for values in batches:
            count = len(next(iter(values.values())))
            for first in range(0, count, self.rows):
                part = {name: value[first : first + self.rows] for name, value in values.items()}
                scores, left = self.session.run(["scores", "exit"], {**part, **self.thresholds})
                ids = start + first + np.arange(len(left))
                for exit in np.unique(left):
                    yield Leaving(int(exit), ids[left == exit], scores[left == exit])
            start += count


class Runner:
    """Answers batches from an exported folder, each sample leaving as soon as the policy in it says so.

    Args:
        folder: what ``export`` wrote.
        form: ``"stages"``, at any batch size; ``"single"``, the self-exiting file for one sample at a time;
            ``"batched"``, the self-exiting file for batches.
        thresholds: other numbers for the policy, by name, e.g. ``{"threshold": 0.9}``.
        micro_batch: rows run at a time; ``None``: all that come together.
        settings: of ONNX Runtime.

    Raises:
        RunnerError: a file of the folder is missing, damaged or does not fit the others, or ONNX Runtime does
            not take it.

    Usage::

        answers = Runner("out")(images)
    """

    def __init__(
        self,
        folder: str | Path,
        form: str = "stages",
        *,
        thresholds: Mapping[str, float | int] | None = None,
        micro_batch: int | None = 32,
        settings: Settings | None = None,
    ):
        if form not in FORMS:
            raise RunnerError(f"no form '{form}'. Use one of: {', '.join(FORMS)}.")
        if micro_batch is not None and micro_batch < 1:
            raise RunnerError(f"a micro-batch has at least one row, got micro_batch={micro_batch}.")
        self.folder, self.form = Path(folder), form
        self.settings = settings or Settings()
        self.manifest = read_manifest(self.folder)
        self.exits: list[int] = self.manifest["exits"]
        self.costs: list[float] = self.manifest["costs"]
        numbers = {**self.manifest["thresholds"], **(thresholds or {})}
        self._driver = self._stages(numbers, micro_batch) if form == "stages" else self._one_file(numbers, micro_batch)

    def __call__(self, images: Any) -> Answers:
        """Answer a batch.

        Args:
            images: ``(n, …)`` with n of at least 1, as the manifest's ``inputs`` say; of several inputs a mapping.

        Raises:
            RunnerError: the batch is empty, of another shape or type, or holds numbers that are not finite.
        """
        return self._driver.answer(self.check(images))

    def stream(self, batches: Iterable[Any], *, refill: bool = False) -> Iterator[Answers]:
        """Hand each answer out when its sample leaves; ``ids`` number the samples over all batches.

        Args:
            batches: of images; read one at a time.
            refill: samples that stay may wait for those of later batches and go on together.
        """
        values = (self.check(images) for images in batches)
        if isinstance(self._driver, OneFile):
            if refill:
                raise RunnerError("refill takes form='stages': one file answers a batch in one call.")
            found = self._driver.stream(values)
        else:
            found = self._driver.stream(values, refill=refill)
        for leaving in found:
            yield collect([leaving], self.exits, self.costs)

    def anytime(self, images: Any) -> Iterator[Answers]:
        """The best answer so far for every sample, exit by exit, until nobody is left in the network."""
        so_far: Answers | None = None
        for leaving in self.cascade.anytime(self.check(images)):
            here = collect([leaving], self.exits, self.costs)
            so_far = here if so_far is None else so_far.updated(here)
            yield so_far

    @property
    def cascade(self) -> Cascade:
        """What drives the stages.

        Raises:
            RunnerError: this runs one file.
        """
        if isinstance(self._driver, OneFile):
            raise RunnerError(f"this takes form='stages'; form='{self.form}' gives nothing out between its exits.")
        return self._driver

    def with_thresholds(self, thresholds: Mapping[str, float | int]) -> Runner:
        """The same sessions with other numbers for the policy."""
        other, driver = copy.copy(self), self._driver
        if isinstance(driver, OneFile):
            numbers = {**driver.thresholds, **typed_thresholds(driver.session, thresholds)}
            other._driver = replace(driver, thresholds=numbers)
        else:
            other._driver = replace(driver, stages=driver.stages.with_thresholds(thresholds))  # type: ignore[attr-defined]
        return other

    def check(self, images: Any) -> Values:
        """A batch by name, once it is known to be one."""
        expected = {one["name"]: one for one in self.manifest["inputs"]}
        if not isinstance(images, Mapping):
            if len(expected) > 1:
                raise RunnerError(f"the network takes {', '.join(expected)}: pass a mapping from name to array.")
            images = {next(iter(expected)): images}
        if images.keys() != expected.keys():
            raise RunnerError(f"the network takes {', '.join(expected)}; got {', '.join(images)}.")
        values = {name: np.asarray(value) for name, value in images.items()}
        for name, value in values.items():
            _check(name, value, expected[name])
        if len({len(value) for value in values.values()}) > 1:
            raise RunnerError(f"inputs differ in rows: { ({name: len(v) for name, v in values.items()}) }.")
        return values

    def _stages(self, thresholds: Mapping[str, float | int], micro_batch: int | None) -> Cascade:
        parts = self.manifest["stages"]
        models = [checked_file(self.folder, part) for part in parts]
        stages = OnnxStages(models, self.exits, thresholds, self.settings)
        for part, session in zip(parts, stages.sessions, strict=True):
            for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
                names = [value.name for value in found]
                if names != part[kind]:
                    raise RunnerError(
                        f"{part['file']} has the {kind} {', '.join(names)}; {MANIFEST} says {', '.join(part[kind])}. "
                        "They are not of one export: export anew."
                    )
        return Cascade(stages, self.costs, None, micro_batch)

    def _one_file(self, thresholds: Mapping[str, float | int], micro_batch: int | None) -> OneFile:
        part = self.manifest[self.form]
        if part is None:
            raise RunnerError(f"{self.folder} was exported without a {self.form} file. Use form='stages'.")
        session = self.settings.open(checked_file(self.folder, part), part["file"])
        numbers = typed_thresholds(session, thresholds)
        rows = 1 if self.form == "single" else micro_batch or sys.maxsize
        return OneFile(session, self.exits, self.costs, numbers, rows)


def _check(name: str, value: np.ndarray, expected: Mapping[str, Any]) -> None:
    shape = tuple(expected["shape"])
    if value.shape[1:] != shape or value.ndim == 0 or value.dtype != expected["dtype"]:
        raise RunnerError(
            f"{name} must be of shape (n, {', '.join(map(str, shape))}) and {expected['dtype']}, "
            f"got {value.shape} and {value.dtype}."
        )
    if len(value) == 0:
        raise RunnerError(f"{name} holds no sample: a batch has at least one.")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        rows = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))
        raise RunnerError(f"{name} holds numbers that are not finite, first in row {rows[0]} ({len(rows)} in all).")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself.

    Raises:
        RunnerError: there is none, or it is of another kind or a later format, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunnerError(f"no file {path}. Name a folder that shallowdeep exported.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunnerError(f"cannot read {path} as JSON ({error}). Export anew.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "shallowdeep export":
        raise RunnerError(f"{path} is no manifest of a shallowdeep export.")
    version = manifest.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise RunnerError(
            f"{path} has format {_shown(version)}; this runner reads up to {FORMAT}. Use the folder's own run.py."
        )
    for problem in (*_MANIFEST(manifest, ""), *_LAZINESS(manifest.get("laziness", {}), "laziness")):
        raise RunnerError(f"{path}: {problem}. Export anew.")
    exits, costs, ends = manifest["exits"], manifest["costs"], [stage["exit"] for stage in manifest["stages"]]
    if ends != exits or len(costs) != len(ends):
        raise RunnerError(
            f"{path} contradicts itself: exits {exits}, stages that end at {ends}, {len(costs)} costs. Export anew."
        )
    return manifest


_Check = Callable[[Any, str], Iterator[str]]
"""A value of a manifest, and its name there, to what is wrong with it."""


def _is(what: str, holds: Callable[[Any], bool]) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not holds(value):
            yield f"{name} = {_shown(value)} is not {what}"

    return check


def _each(inner: _Check, *, least: int = 0) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, list) or len(value) < least:
            yield f"{name} = {_shown(value)} is not a list" + (f" of at least {least}" if least else "")
            return
        for place, one in enumerate(value):
            yield from inner(one, f"{name}[{place}]")

    return check


def _named(inner: _Check) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{name} = {_shown(value)} is not a mapping from names"
            return
        for key, one in value.items():
            yield from inner(one, f"{name}.{key}")

    return check


def _with(**parts: _Check) -> _Check:
    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{name} = {_shown(value)} is not a mapping with {', '.join(parts)}"
            return
        for key, inner in parts.items():
            if key in value:
                yield from inner(value[key], f"{name}.{key}" if name else key)
            else:
                yield f"{name or 'it'} does not say {key}"

    return check


def _or_none(inner: _Check) -> _Check:
    return lambda value, name: iter(()) if value is None else inner(value, name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _rises(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
    return whole and value[0] >= 0 and value == sorted(set(value))


def _is_dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and np.dtype(value).kind in "biuf"
    except TypeError:
        return False


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


_TEXT = _is("a text", lambda value: isinstance(value, str))
_NUMBERS = _named(_is("a finite number", _is_number))
_FILE = {
    "file": _is("the name of a file in the folder", lambda value: isinstance(value, str) and value == Path(value).name),
    "sha256": _TEXT,
}
_SIZE = _is("a whole number above 0", lambda value: type(value) is int and value > 0)
_MANIFEST = _with(
    exits=_is("a list of rising whole numbers", _rises),
    costs=_each(_is("a number above 0", lambda value: _is_number(value) and value > 0)),
    thresholds=_NUMBERS,
    extremes=_or_none(_with(early=_NUMBERS, late=_NUMBERS)),
    inputs=_each(
        _with(
            name=_TEXT,
            dtype=_is("a type of numbers", _is_dtype),
            shape=_each(_SIZE),
            range=_is("two finite numbers, the smaller first", _is_range),
        ),
        least=1,
    ),
    stages=_each(
        _with(
            **_FILE,
            exit=_is("a whole number", lambda value: type(value) is int),
            inputs=_each(_TEXT, least=1),
            outputs=_each(_TEXT, least=1),
        ),
        least=1,
    ),
    single=_or_none(_with(**_FILE)),
    batched=_or_none(_with(**_FILE)),
)
_LAZINESS = _named(_each(_named(_is("a plain value", lambda value: not isinstance(value, dict | list)))))


def checked_file(folder: Path, part: Mapping[str, Any]) -> Path:
    """A file of the folder, once its contents are known to be those the manifest speaks of."""
    path = folder / part["file"]
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunnerError(f"cannot read {path} ({error.strerror}). Export anew.") from None
    if found != part["sha256"]:
        raise RunnerError(
            f"{path} is not the file that {MANIFEST} speaks of (sha256 {found[:12]}…, there "
            f"{part['sha256'][:12]}…). Export anew."
        )
    return path


# ---------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """An input that leaves at the first exit against one that leaves at none.

    Attributes:
        form: what ran: ``"stages"``, ``"single"`` or ``"batched"``.
        rows: of the batch.
        early_ms: the median time of a batch that leaves at the first exit.
        late_ms: of one that goes through to the last.
        share: what leaving at the first exit costs of going through, in FLOPs.
    """

    form: str
    rows: int
    early_ms: float
    late_ms: float
    share: float

    @property
    def ratio(self) -> float:
        """Early by late; near 1 nothing is saved."""
        return self.early_ms / self.late_ms

    @property
    def leaves_early(self) -> bool:
        """Whether at least a fifth of what leaving saves in FLOPs is saved on the clock."""
        return self.ratio < 1 - 0.2 * (1 - self.share)

    def __str__(self) -> str:
        line = f"{self.form:8} {self.rows:5} {self.early_ms:10.3f} {self.late_ms:10.3f} {self.ratio:8.2f}"
        if self.leaves_early:
            return line
        hint = "too little is saved" if self.form == "stages" else "this provider does not leave early: use the stages"
        return f"{line}   {hint}"


@dataclass(frozen=True)
class Bench:
    """How long a folder's forms take on this machine.

    Attributes:
        provider: what ran them.
        timings: one per form and batch size.
        latency: of each stage.
    """

    provider: str
    timings: tuple[Timing, ...]
    latency: Latency

    def __str__(self) -> str:
        sizes = "".join(f"{size:>10}" for size in self.latency.sizes)
        stages = [
            f"stage {place:<6}" + "".join(f"{ms:10.3f}" for ms in row) for place, row in enumerate(self.latency.run_ms)
        ]
        return "\n".join(
            [
                f"{self.provider}, milliseconds, medians",
                f"{'form':8} {'rows':>5} {'first exit':>10} {'last exit':>10} {'ratio':>8}",
                *map(str, self.timings),
                "",
                f"{'rows':12}{sizes}",
                *stages,
            ]
        )


def bench(
    folder: str | Path,
    *,
    sizes: Sequence[int] = (1, 32),
    repeats: int = 20,
    forms: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Bench:
    """Time a folder's forms: what leaving at the first exit takes, and going through to the last.

    Args:
        folder: what ``export`` wrote.
        sizes: of batches; the single file is timed on one row alone.
        repeats: the median counts.
        forms: to be timed; ``None``: all that the folder has.
        settings: of ONNX Runtime.
    """
    settings = settings or Settings()
    runner = Runner(folder, micro_batch=None, settings=settings)
    there = [form for form in FORMS if runner.manifest[form] is not None]
    timings = []
    for form in there if forms is None else forms:
        one = runner if form == "stages" else Runner(folder, form, micro_batch=None, settings=settings)
        timings += [time_leaving(one, size, repeats) for size in ([1] if form == "single" else sizes)]
    latency = runner.cascade.measure(made_up(runner.manifest, max(sizes)), sizes, repeats=repeats)
    provider = settings.providers[0]
    return Bench(provider if isinstance(provider, str) else provider[0], tuple(timings), latency)


def time_leaving(runner: Runner, rows: int, repeats: int) -> Timing:
    """Time a batch that leaves at the first exit against one that goes through, in turns.

    Raises:
        RunnerError: no thresholds of the policy let everyone leave at the first exit, or nobody.
    """
    extremes = runner.manifest["extremes"]
    if extremes is None:
        raise RunnerError("this policy has no thresholds by which everyone, or nobody, leaves at the first exit.")
    values = made_up(runner.manifest, rows)
    ways = [runner.with_thresholds(extremes[way]) for way in ("early", "late")]
    taken = np.zeros((repeats + 1, 2))
    for repeat in range(repeats + 1):  # the first one is not counted: it allocates
        for place, way in enumerate(ways):
            begin = time.perf_counter()
            way(values)
            taken[repeat, place] = 1e3 * (time.perf_counter() - begin)
    early, late = np.median(taken[1:], axis=0).tolist()
    return Timing(runner.form, rows, early, late, runner.costs[0] / runner.costs[-1])


def made_up(manifest: Mapping[str, Any], rows: int) -> Values:
    """Inputs to time with: random numbers in the range of the example that was exported with."""
    random = np.random.default_rng(0)
    values: Values = {}
    for one in manifest["inputs"]:
        shape, (low, high) = (rows, *one["shape"]), one["range"]
        if np.dtype(one["dtype"]).kind == "f":
            values[one["name"]] = random.uniform(low, high, shape).astype(one["dtype"])
        else:
            values[one["name"]] = random.integers(low, high, shape, endpoint=True).astype(one["dtype"])
    return values


# ---------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", nargs="?", type=Path, help="a .npy file, rows first; of several inputs an .npz file")
    parser.add_argument("--out", type=Path, help="where the answers go, as .npz; else a summary is printed alone")
    parser.add_argument("--bench", action="store_true", help="time this folder on this machine")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="default: this file's")
    parser.add_argument("--form", choices=FORMS, default="stages", help="what to run (default: stages)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="another threshold")
    parser.add_argument("--micro-batch", type=int, default=32, help="rows run at a time (default: 32)")
    parser.add_argument(
        "--provider", action="append", default=[], help="of onnxruntime (default: CPUExecutionProvider)"
    )
    parser.add_argument("--device-id", type=int, default=0, help="number of the GPU (default: 0)")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--spinning", action="store_true", help="threads wait actively")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sizes to time")
    parser.add_argument("--repeats", type=int, default=20, help="of every timing")
    given = parser.parse_args(arguments)
    try:
        alone = hasattr(_onnxruntime(), "set_global_thread_pool_sizes")  # in this process: one pool for all sessions
        providers = tuple(given.provider) or ("CPUExecutionProvider",)
        settings = Settings(given.threads, providers, given.spinning, alone, given.device_id)
        if given.bench:
            print(bench(given.folder, sizes=given.batch, repeats=given.repeats, settings=settings))
            return 0
        if given.images is None:
            raise RunnerError("name a file of images, or pass --bench.")
        runner = Runner(
            given.folder,
            given.form,
            thresholds=dict(map(_threshold, given.set)),
            micro_batch=given.micro_batch,
            settings=settings,
        )
        answers = runner(_load(given.images))
        if given.out is not None:
            _save(given.out, answers)
        print(answers)
        return 0
    except (RunnerError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


def _threshold(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise RunnerError(f"a threshold is set as NAME=NUMBER, got '{text}'.") from None


def _load(path: Path) -> Any:
    try:
        found = np.load(path, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else dict(found)
    except FileNotFoundError:
        raise RunnerError(f"no file {path}.") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunnerError(f"{path} is no .npy or .npz file of numbers ({error}).") from None


def _save(path: Path, answers: Answers) -> None:
    """Write the answers as a whole, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **vars(answers))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
