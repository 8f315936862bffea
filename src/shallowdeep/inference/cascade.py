"""Runs stages on batches, each sample leaving as soon as it may; it knows no run time at all, and numpy alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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

    @cached_property
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
                rest = _Group(np.where(stop, DONE, group.ids), step.values)
                if len(rest.live):
                    going_on.append(rest)
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
        rest = _Group(ids, step.values, group.batch)
        return leaving, rest if len(rest.live) else None


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
    return (ids != DONE).nonzero()[0]


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
