"""Run an exported Shallow-Deep Network stage by stage, and let every sample leave as soon as it may.

This one file needs numpy and onnxruntime alone: every exported folder holds a copy of it as ``run.py``.

    python run.py images.npy --out answers.npz
    python run.py --bench

The first half, down to ``Cascade``, knows no run time at all and drives the stages of every back end.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

Values = dict[str, Any]
"""What goes from stage to stage: name to array, one row per sample, in arrays of the run time's own kind."""

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
        """Milliseconds of a stage on some rows; between two sizes, and beyond them, a straight line."""
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

    @property
    def live(self) -> np.ndarray:
        return live_rows(self.ids)


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

    def answer(self, inputs: Values, *, plan: np.ndarray | None = None) -> Answers:
        """Answer a batch of any size.

        Args:
            inputs: rows first.
            plan: the exit of each sample, in place of the policy's decisions: to time an engine.

        Returns:
            The answers, in the order of the inputs.
        """
        return collect(self.stream([inputs], refill=True, plan=plan), self.stages.exits, self.costs)

    def stream(
        self, batches: Iterable[Values], *, refill: bool = False, plan: np.ndarray | None = None
    ) -> Iterator[Leaving]:
        """Hand samples out when they leave.

        Args:
            batches: of inputs.
            refill: let the survivors of several batches wait at a stage for each other, where running them
                together pays.
            plan: as for ``answer``.
        """
        waiting: list[list[_Group]] = [[] for _ in self.stages.exits]
        for group in self._split(batches):
            waiting[0].append(group)
            yield from self._drain(waiting, plan, flush=not refill)
        yield from self._drain(waiting, plan, flush=True)

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

    def _split(self, batches: Iterable[Values]) -> Iterator[_Group]:
        """Batches as groups of at most ``micro_batch`` rows, numbered on."""
        start = 0
        for values in batches:
            rows = len(next(iter(values.values())))
            ids = np.arange(start, start + rows)
            most = self._most(rows)
            for first in range(0, rows, most):
                part = slice(first, first + most)
                yield _Group(ids[part], values if rows <= most else {name: v[part] for name, v in values.items()})
            start += rows

    def _most(self, rows: int) -> int:
        """How many rows may be run at a time, of some that are there."""
        limits = [rows, self.micro_batch, self.stages.sizes[-1] if self.stages.sizes else None]
        return min(limit for limit in limits if limit)

    def _drain(self, waiting: list[list[_Group]], plan: np.ndarray | None, *, flush: bool) -> Iterator[Leaving]:
        # From shallow to deep: what comes out of one stage may make the next one's batch full.
        for stage, groups in enumerate(waiting):
            while (group := self._due(stage, groups, flush)) is not None:
                leaving, rest = self._advance(stage, group, plan)
                if len(leaving.ids):
                    yield leaving
                if rest is not None:
                    waiting[stage + 1].append(rest)

    def _due(self, stage: int, groups: list[_Group], flush: bool) -> _Group | None:
        """Takes out of a stage's queue what shall be run now."""
        if not groups:
            return None
        rows = sum(len(group.live) for group in groups)
        most = self._most(rows)
        if rows < (self.micro_batch or rows) and not flush and self._waits(stage, rows):
            return None
        if len(groups) == 1 and len(groups[0].live) <= most:
            return self._fitted(stage, groups.pop())
        picked, count = [], 0
        while groups and count < most:
            group = groups.pop(0)
            live = group.live
            now, later = live[: most - count], live[most - count :]
            if len(later):
                groups.insert(0, _Group(group.ids[later], self.stages.take(group.values, later)))
            whole = len(now) == len(group.ids)
            picked.append(group if whole else _Group(group.ids[now], self.stages.take(group.values, now)))
            count += len(now)
        joined = _Group(np.concatenate([g.ids for g in picked]), self.stages.join([g.values for g in picked]))
        return self._fitted(stage, joined)

    def _waits(self, stage: int, rows: int) -> bool:
        """Whether a row is cheaper in a full batch than in one of ``rows``, by more than the noise."""
        if self.latency is None or self.micro_batch is None:
            return True
        alone, full = self.latency.run(stage, rows) / rows, self.latency.run(stage, self.micro_batch) / self.micro_batch
        return alone > 1.05 * full

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
        return _Group(ids, self.stages.take(group.values, rows))

    def _size(self, rows: int) -> int:
        if not self.stages.sizes:
            return rows
        return next(size for size in self.stages.sizes if size >= rows)

    def _advance(self, stage: int, group: _Group, plan: np.ndarray | None) -> tuple[Leaving, _Group | None]:
        """Run a stage: who leaves, and who goes on."""
        step = self.stages.run(stage, group.values)
        stop, scores = self.stages.fetch(step)
        exit = self.stages.exits[stage]
        leaving, ids = settle(group.ids, stop, scores, exit, last=stage == len(self.stages.exits) - 1, plan=plan)
        return leaving, _Group(ids, step.values) if (ids != DONE).any() else None


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
