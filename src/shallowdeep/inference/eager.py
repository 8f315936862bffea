"""The network as it is, run by its own code: hooks let finished rows leave, and end the forward with the last."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from shallowdeep.errors import ConfigError, NetworkError
from shallowdeep.inference.answers import Answers, Leaving, collect, live_rows, settle
from shallowdeep.inference.backends import Order
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.latency import Latency, pays
from shallowdeep.inference.stages import as_inputs
from shallowdeep.inference.torch_stages import fetch, index_on, network_for, take, wait_for
from shallowdeep.networks.calls import exact_float32, in_eval_mode
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import letting_leave
from shallowdeep.policies.rules import ExitPolicy, State, exits_of

Found = TypeVar("Found")


class _Finished(BaseException):
    """Ends a network's forward: no row is left in it. No ``Exception``, which a network may catch."""


class _Abandoned(BaseException):
    """Ends all work: nobody waits for the answers any more."""


@dataclass(frozen=True)
class Eager:
    """Runs any attached network on batches, and lets each sample leave where its policy says so.

    Threads take turns on one network. A batch stays within the network's own call, so survivors of several
    batches never meet: there is no ``refill``.

    Args:
        sdn: its mode is restored after each call.
        policy: decides at each exit it looks at.
        like: inputs built as the network takes them.
        costs: of leaving at each of the policy's exits.
        latency: as for ``Cascade``.
        micro_batch: rows run at a time; ``None``: all that come together.
    """

    sdn: ShallowDeepNetwork
    policy: ExitPolicy
    like: Any
    costs: Sequence[float]
    latency: Latency | None = None
    micro_batch: int | None = None

    @property
    def exits(self) -> list[int]:
        """The exits at which rows may leave, the last among them."""
        return exits_of(self.policy, self.sdn.num_exits)

    def answer(self, inputs: Values, *, plan: np.ndarray | None = None) -> Answers:
        """Answer a batch of any size; see ``Cascade.answer``."""
        found: list[Leaving] = []
        self._run(inputs, found.append, plan)
        return collect(found, self.exits, self.costs)

    def stream(
        self, batches: Iterable[Values], *, refill: bool = False, plan: np.ndarray | None = None
    ) -> Iterator[Leaving]:
        """Hand samples out when they leave, while the network goes on with their batch in a thread of its own.

        Raises:
            ConfigError: samples are to wait for each other.
        """
        if refill:
            raise ConfigError("backend='eager' runs a batch in one call of the network; refill takes stages.")
        start = 0
        for values in batches:
            yield from _handed_out(partial(self._run, values, plan=plan, start=start))
            start += _num_rows(values)

    def anytime(self, inputs: Values) -> Iterator[Leaving]:
        """What would be answered at each exit, for everyone still in the network there, exit by exit."""
        whole = replace(self, micro_batch=None)
        return _handed_out(partial(whole._run, inputs, plan=None, all_live=True))

    def logits(self, inputs: Values) -> list[Tensor]:
        """Logits ``(n, outputs)`` at each exit, nobody leaving."""
        found: list[list[Tensor]] = [[] for _ in self.exits]
        with torch.no_grad(), in_eval_mode(self.sdn), exact_float32():
            for _, part in self._split(inputs):
                logits = self.sdn(as_inputs(self._cast(part), self.like))
                for store, exit in zip(found, self.exits, strict=True):
                    store.append(logits[exit].float().cpu())
        return [torch.cat(store) for store in found]

    def measure(self, inputs: Values, sizes: Iterable[int], *, repeats: int) -> Latency:
        """Time the network from exit to exit; see ``Cascade.measure``."""
        sizes = sorted(sizes)
        rows = _num_rows(inputs)
        takes, runs = np.zeros((2, repeats + 1, len(self.exits), len(sizes)))
        with torch.no_grad(), in_eval_mode(self.sdn), exact_float32():
            for repeat in range(repeats + 1):
                for place, size in enumerate(sizes):
                    watch = _Watch(self, size)
                    watch.run(as_inputs(self._cast(take(inputs, np.arange(size) % rows)), self.like))
                    runs[repeat, :, place], takes[repeat, :, place] = watch.run_ms, watch.take_ms
        run_ms, take_ms = np.median(runs[1:], axis=0).tolist(), np.median(takes[1:], axis=0).tolist()
        return Latency(tuple(sizes), tuple(map(tuple, run_ms)), tuple(map(tuple, take_ms)))

    def _cast(self, inputs: Values) -> Values:
        """Inputs in the network's own precision."""
        dtype = next(self.sdn.parameters()).dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def _run(
        self,
        inputs: Values,
        hand_out: Callable[[Leaving], None],
        plan: np.ndarray | None,
        *,
        start: int = 0,
        all_live: bool = False,
    ) -> None:
        # No inference mode: what a network of somebody else's keeps of a first forward shall serve in training too.
        with torch.no_grad(), in_eval_mode(self.sdn), exact_float32():
            for first, part in self._split(inputs):
                ids = start + first + np.arange(_num_rows(part))
                _Forward(self, ids, hand_out, plan, all_live).run(as_inputs(self._cast(part), self.like))

    def _split(self, inputs: Values) -> Iterator[tuple[int, Values]]:
        """Parts of at most ``micro_batch`` rows, each with the number of its first row."""
        rows = _num_rows(inputs)
        for first in range(0, rows, self.micro_batch or rows):
            part = slice(first, first + (self.micro_batch or rows))
            yield first, {name: value[part] for name, value in inputs.items()}


def _num_rows(values: Values) -> int:
    return len(next(iter(values.values())))


class _Forward:
    """One forward of one batch."""

    def __init__(
        self,
        eager: Eager,
        ids: np.ndarray,
        hand_out: Callable[[Leaving], None],
        plan: np.ndarray | None,
        all_live: bool,
    ):
        self.eager, self.ids, self.hand_out, self.plan, self.all_live = eager, ids, hand_out, plan, all_live
        self.state: State | None = None
        self.looked = 0

    def run(self, inputs: Any) -> None:
        eager, sdn = self.eager, self.eager.sdn
        internal = list(enumerate(eager.exits[:-1]))
        looks = {sdn.taps[exit]: partial(self.look, place, exit) for place, exit in internal}
        row_inputs = {one for _, exit in internal for one in sdn.placements[exit].site.row_inputs}
        try:
            with letting_leave(sdn.backbone, looks, row_inputs):
                logits = sdn.run_backbone(inputs)
            if self.looked < len(internal):
                raise NetworkError(
                    f"{len(internal) - self.looked} of the {len(internal)} tapped modules did not run in this forward: "
                    "the network skips them for these inputs, or it was compiled after the exits were attached."
                )
            self.settle(logits, eager.exits[-1])
        except _Finished:
            pass

    def look(self, place: int, exit: int, features: Tensor) -> Tensor | None:
        """An exit's answer to what it sees: the rows that go on, ``None`` for all."""
        self.looked += 1
        self.settle(self.eager.sdn.exits[exit](features), exit)
        live = live_rows(self.ids)
        if len(live) == 0:
            raise _Finished
        if len(live) == len(self.ids) or not pays(self.eager.latency, place + 1, len(live), len(self.ids)):
            return None
        rows = index_on(features.device, live)
        self.ids = self.ids[live]
        self.state = tuple(part[rows] for part in self.state or ())
        return rows

    def settle(self, logits: Tensor, exit: int) -> None:
        eager, logits = self.eager, logits.float()
        if self.state is None:
            state = eager.policy.start(len(self.ids), eager.sdn.num_outputs)
            self.state = tuple(part.to(logits.device) for part in state)
        verdict = eager.policy.step(self.state, logits, exit)
        self.state = verdict.state
        stop, scores = fetch(verdict.stop, verdict.scores)
        before = self.ids
        leaving, self.ids = settle(before, stop, scores, exit, last=exit == eager.exits[-1], plan=self.plan)
        if self.all_live:
            live = live_rows(before)
            leaving = Leaving(exit, before[live], scores[live])
        if len(leaving.ids):
            self.hand_out(leaving)


class _Watch(_Forward):
    """A forward that nobody leaves and that is timed from exit to exit."""

    def __init__(self, eager: Eager, size: int):
        last = np.full(size, eager.exits[-1])
        super().__init__(eager, np.arange(size), lambda leaving: None, last, False)
        self.run_ms: list[float] = []
        self.take_ms: list[float] = [0.0]
        self.begin = 0.0

    def run(self, inputs: Any) -> None:
        self.begin = time.perf_counter()
        super().run(inputs)

    def look(self, place: int, exit: int, features: Tensor) -> Tensor | None:
        super().look(place, exit, features)
        picking = time.perf_counter()
        features[index_on(features.device, np.arange(len(features)))]
        wait_for(features.device)
        self.begin = time.perf_counter()
        self.take_ms.append(1e3 * (self.begin - picking))
        return None

    def settle(self, logits: Tensor, exit: int) -> None:
        super().settle(logits, exit)
        self.run_ms.append(1e3 * (time.perf_counter() - self.begin))


def build_eager(order: Order) -> Eager:
    """The network itself; in another precision a copy of it."""
    order.take_options()
    return Eager(network_for(order), order.policy, order.example_inputs, order.costs, None, order.rows)


def _handed_out(work: Callable[[Callable[[Found], None]], None]) -> Iterator[Found]:
    """What some work hands out, while it goes on in a thread; it ends early where nobody waits any more."""
    out: queue.SimpleQueue[Any] = queue.SimpleQueue()
    abandoned = threading.Event()
    end = object()

    def hand_out(found: Found) -> None:
        if abandoned.is_set():
            raise _Abandoned
        out.put(found)

    def run() -> None:
        try:
            work(hand_out)
            out.put(end)
        except _Abandoned:
            out.put(end)
        except BaseException as error:
            out.put(_Failed(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (found := out.get()) is not end:
            if isinstance(found, _Failed):
                raise found.error
            yield found
    finally:
        abandoned.set()
        thread.join()


@dataclass(frozen=True)
class _Failed:
    error: BaseException
