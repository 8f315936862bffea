"""Runs stages on batches, each sample leaving as soon as it may; it knows no run time at all, and numpy alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from shallowdeep.inference.answers import DONE, Answers, Leaving, collect, live_rows, settle
from shallowdeep.inference.latency import Latency, pays

Values = dict[str, Any]
"""What goes from stage to stage: name to array, one row per sample, in arrays of the run time's own kind."""

MAX_WAIT = 8  # batches after which a sample waits no longer for others


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
