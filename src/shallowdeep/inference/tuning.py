"""Which back end is the fastest here: all of one precision, timed in turns on the batch size that will be used.

What was chosen is kept in the user's cache folder, and found again there for the same network, policy, batch size,
inputs, device, number of threads and versions.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.data.files.cache import cache_folder
from shallowdeep.errors import ConfigError, FileFormatError, ShallowDeepError, UnknownName
from shallowdeep.inference.backends import BACKENDS, Driver, Order
from shallowdeep.inference.runner import Latency, RunnerError, Values
from shallowdeep.inference.stages import as_values
from shallowdeep.networks.calls import distinct_rows, first_line
from shallowdeep.policies.rules import Confidence
from shallowdeep.progress import track
from shallowdeep.storage import read_as, read_json, write_json

CANDIDATES = tuple(name for name in BACKENDS if name != "plain")
MICRO_BATCH = 32  # tried beside the whole batch: small enough for the caches, large enough for the cores
PACKAGES = ("shallowdeep", "torch", "numpy", "onnxruntime", "openvino")
UNUSABLE = (ShallowDeepError, RunnerError, ImportError)
"""What a back end raises that cannot run here, or not this network."""


@dataclass(frozen=True)
class TunedWay:
    """One way to answer a batch, and how long it took.

    Attributes:
        backend: the run time.
        micro_batch: rows run at a time.
        by_table: finished rows are dropped where that pays by the measured table; else always.
        ms: of one batch, the median.
        spread_ms: between the quartiles.
        plain_ms: of the same network without exits in the same run time, at the best of the micro-batches;
            ``None``: it does not run there.
    """

    backend: str
    micro_batch: int
    by_table: bool
    ms: float
    spread_ms: float
    plain_ms: float | None

    @property
    def ratio(self) -> float | None:
        """Its time by that of the same run time without exits; above 1 the exits cost more than they save."""
        return None if self.plain_ms is None else self.ms / self.plain_ms


@dataclass(frozen=True)
class Tuning:
    """What ``Engine.tune`` found.

    Attributes:
        batch_size: rows of a batch.
        precision: of all that was timed.
        device: it ran on.
        threads: PyTorch's.
        ways: fastest first; the first one is what the engine uses.
        plain_ms: of the backbone alone, run by its own code.
        left_out: back ends that cannot run here, and why.
        latency: the table the engine goes by; ``None``: it drops finished rows always.
        from_cache: it was found in the cache, not timed now.
    """

    batch_size: int
    precision: str
    device: str
    threads: int
    ways: tuple[TunedWay, ...]
    plain_ms: float
    left_out: dict[str, str] = field(default_factory=dict)
    latency: Latency | None = None
    from_cache: bool = False

    @property
    def chosen(self) -> TunedWay:
        """The fastest."""
        return self.ways[0]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        kept = ", from the cache" if self.from_cache else ""
        lines = [
            f"batches of {self.batch_size} in {self.precision} on {self.device}, {self.threads} threads{kept}",
            f"{'back end':10} {'micro-batch':>11} {'drops rows':>14} {'ms':>9} {'spread':>7} "
            f"{'by its plain':>12} {'by eager plain':>14}",
        ]
        for way in self.ways:
            drops = "where it pays" if way.by_table else "always"
            own = "-" if way.ratio is None else f"{way.ratio:.2f}"
            lines.append(
                f"{way.backend:10} {way.micro_batch:11} {drops:>14} {way.ms:9.2f} {way.spread_ms:7.2f} "
                f"{own:>12} {way.ms / self.plain_ms:14.2f}"
            )
        lines.append(f"{'plain':10} {'':26} {self.plain_ms:9.2f}")
        lines += [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        fastest = min([self.plain_ms, *(way.plain_ms for way in self.ways if way.plain_ms is not None)])
        if self.chosen.ms > fastest:
            lines.append(f"exits do not pay here: the fastest network without them takes {fastest:.2f} ms.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Task:
    """What is timed.

    Attributes:
        order: what each back end is asked to run.
        backends: the back ends, with options for each.
        rows: a batch's inputs, as tensors.
        plan: the exit of each sample; ``None``: the policy decides.
        repeats: the median of so many counts.
        progress: show how far it is, on a terminal.
    """

    order: Order
    backends: Mapping[str, Mapping[str, Any]]
    rows: Values
    plan: np.ndarray | None
    repeats: int
    progress: bool = False

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return len(next(iter(self.rows.values())))

    @property
    def device(self) -> torch.device:
        """The network's."""
        return next(self.order.sdn.parameters()).device

    def rows_for(self, backend: str) -> Values:
        """A batch as a back end takes it."""
        if BACKENDS[backend].on_tensors:
            return {name: tensor.to(self.device) for name, tensor in self.rows.items()}
        return {name: tensor.cpu().numpy() for name, tensor in self.rows.items()}

    def build(self, backend: str, *, without_exits: bool = False) -> Driver:
        """A back end's driver, with the policy or for the network without exits."""
        policy = Confidence(2.0, exits=()) if without_exits else self.order.policy
        options = self.backends.get(backend, {})
        return BACKENDS[backend].build(replace(self.order, policy=policy, options=options))

    def micro_batches(self, driver: Driver) -> list[int]:
        """The numbers of rows at a time that are worth trying with a driver."""
        if self.order.micro_batch is not None:
            return [driver.micro_batch or self.order.micro_batch]
        sizes = getattr(getattr(driver, "stages", None), "sizes", None)
        # Never fewer than MICRO_BATCH, however small the batches timed here: larger ones may come.
        tried = {MICRO_BATCH, max(MICRO_BATCH, self.batch_size)}
        return sorted({min(rows, sizes[-1]) if sizes else rows for rows in tried})

    def key(self) -> str:
        """Changes with anything that the choice depends on."""
        sdn, order = self.order.sdn, self.order
        words = {
            "taps": sdn.taps,
            "network": _digest(sdn.state_dict()),
            "backbone": repr(sdn.backbone),
            "policy": order.policy.to_dict(),
            "costs": order.costs,
            "precision": order.precision,
            "micro_batch": order.micro_batch,
            "backends": {name: dict(options) for name, options in self.backends.items()},
            "inputs": _digest(self.rows),
            "plan": None if self.plan is None else self.plan.tolist(),
            "device": _device_name(self.device),
            "threads": torch.get_num_threads(),
            "versions": {name: _version(name) for name in PACKAGES},
        }
        return hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:32]


def make_task(
    order: Order,
    batch_size: int,
    *,
    inputs: Any = None,
    exit_shares: Sequence[float] | None = None,
    backends: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
    repeats: int = 10,
    progress: bool = False,
) -> Task:
    """Say what is to be timed.

    Args:
        order: with example inputs; its options go to no back end.
        batch_size: rows of a batch.
        inputs: at least one sample, repeated or cut to a batch; ``None``: random ones.
        exit_shares: how many leave at each of the policy's exits, in place of its decisions; ``None``: the policy
            decides on ``inputs``, and as many leave at each exit of random ones.
        backends: to be timed, with options where it is a mapping; ``None``: all.
        repeats: the median of so many counts.
        progress: show how far it is, on a terminal.

    Raises:
        ConfigError: an argument is not usable.
    """
    if batch_size < 1 or repeats < 1:
        raise ConfigError(f"batch_size and repeats are at least 1, got {batch_size} and {repeats}.")
    if backends is None:
        backends = CANDIDATES
    named = dict(backends) if isinstance(backends, Mapping) else {name: {} for name in backends}
    for name in named:
        if name not in CANDIDATES:
            raise UnknownName("back end with exits", name, CANDIDATES)
    if not named:
        raise ConfigError(f"backends names none to time; there are {', '.join(CANDIDATES)}.")
    if inputs is None:
        rows = as_values(distinct_rows(order.example_inputs, batch_size))
        exit_shares = exit_shares or [1 / len(order.exits)] * len(order.exits)
    else:
        values = as_values(inputs)
        rows = {name: tensor[torch.arange(batch_size) % len(tensor)] for name, tensor in values.items()}
    plan = None if exit_shares is None else planned(exit_shares, order.exits, batch_size)
    return Task(order, named, rows, plan, repeats, progress)


def planned(exit_shares: Sequence[float], exits: Sequence[int], rows: int) -> np.ndarray:
    """An exit for each of some rows, in no order, so that each exit gets its share.

    Raises:
        ConfigError: the shares do not fit the exits, or are none.
    """
    shares = np.asarray(exit_shares, dtype=np.float64)
    if shares.shape != (len(exits),) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ConfigError(
            f"exit_shares are one share for each of the exits {list(exits)}, together 1; got {list(exit_shares)}."
        )
    ends = np.round(np.cumsum(shares) * rows)
    stages = np.searchsorted(ends, np.arange(rows), side="right")
    return np.asarray(exits)[np.random.default_rng(0).permutation(stages)]


def tune(task: Task, *, anew: bool = False) -> tuple[Tuning, Driver]:
    """Time the back ends in turns, or find in the cache what that gave.

    Args:
        task: what is timed.
        anew: do not look into the cache.

    Returns:
        What was found, and the driver of the fastest.

    Raises:
        ConfigError: no back end can run here; it says why of each.
    """
    path = cache_folder() / "tuning" / f"{task.key()}.json"
    found = None if anew else _kept(path)
    if found is not None:
        try:
            driver = task.build(found.chosen.backend)
            return found, _set(driver, found.latency, found.chosen.micro_batch)
        except UNUSABLE:  # it could when it was chosen
            pass
    tuning, driver = _timed(task)
    try:
        write_json(path, replace(tuning, from_cache=True).to_dict())
    except OSError as error:
        warnings.warn(
            f"cannot keep the choice in {path} ({error}); it will be timed anew. "
            "Set SHALLOWDEEP_CACHE to a folder that can be written.",
            stacklevel=3,
        )
    return tuning, driver


@dataclass(frozen=True)
class _Lane:
    """Something that is timed: a driver on a batch."""

    backend: str
    driver: Driver
    rows: Values
    plan: np.ndarray | None
    has_exits: bool

    def run(self) -> float:
        """Milliseconds of one batch."""
        begin = time.perf_counter()
        self.driver.answer(self.rows, plan=self.plan)
        return 1e3 * (time.perf_counter() - begin)


def _timed(task: Task) -> tuple[Tuning, Driver]:
    lanes: list[_Lane] = []
    left_out: dict[str, str] = {}
    names = ["plain", *task.backends]
    for name in track(names, len(names), "preparing back ends", shown=task.progress):
        if task.order.precision not in BACKENDS[name].precisions:
            left_out[name] = f"it runs in {', '.join(BACKENDS[name].precisions)}"
            continue
        try:
            prepared = _lanes(task, name)
            for lane in prepared:  # compiles, allocates
                lane.run()
            lanes += prepared
        except UNUSABLE as error:
            if name == "plain":
                raise
            left_out[name] = first_line(error)
    if not any(lane.has_exits for lane in lanes):
        raise ConfigError(
            "no back end can run here: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()) + "."
        )
    taken = np.zeros((len(lanes), task.repeats))
    for repeat in track(range(task.repeats), task.repeats, "timing", shown=task.progress):
        for place, lane in enumerate(lanes):  # in turns: a slower moment of the machine meets all of them
            taken[place, repeat] = lane.run()
    return _chosen(task, lanes, taken, left_out)


def _lanes(task: Task, backend: str) -> list[_Lane]:
    """What is timed of a back end: each micro-batch, with a table and without, and without exits."""
    rows, driver = task.rows_for(backend), task.build(backend)
    sizes = task.micro_batches(driver)
    if backend == "plain":
        return [_Lane(backend, _set(driver, None, size), rows, None, False) for size in sizes]
    table = driver.measure(rows, _sizes(driver, min(max(sizes), task.batch_size)), repeats=task.repeats)
    lanes = [
        _Lane(backend, _set(driver, latency, size), rows, task.plan, True)
        for size in sizes
        for latency in (None, table)
    ]
    if backend == "eager":  # its network without exits is "plain"
        return lanes
    plain = task.build(backend, without_exits=True)
    return lanes + [_Lane(backend, _set(plain, None, size), rows, None, False) for size in sizes]


def _sizes(driver: Driver, most: int) -> list[int]:
    """Sizes of batches to measure: those it is built for, so that none is left to be compiled; else powers of two."""
    built_for = getattr(getattr(driver, "stages", None), "sizes", None)
    if built_for:
        within = [size for size in built_for if size < most]
        return [*within, *built_for[len(within) : len(within) + 1]]  # and the one that a batch is filled up to
    return sorted({min(2**power, most) for power in range(most.bit_length() + 1)})


def _chosen(task: Task, lanes: Sequence[_Lane], taken: np.ndarray, left_out: dict[str, str]) -> tuple[Tuning, Driver]:
    median = np.median(taken, axis=1)
    low, high = np.quantile(taken, [0.25, 0.75], axis=1)
    plains: dict[str, float] = {}
    for lane, ms in zip(lanes, median.tolist(), strict=True):
        if not lane.has_exits:
            plains[lane.backend] = min(ms, plains.get(lane.backend, ms))
    plains["eager"] = plains["plain"]  # the backbone by its own code
    found = [
        (
            TunedWay(
                lane.backend,
                lane.driver.micro_batch or task.batch_size,
                lane.driver.latency is not None,
                float(median[place]),
                float(high[place] - low[place]),
                plains.get(lane.backend),
            ),
            lane.driver,
        )
        for place, lane in enumerate(lanes)
        if lane.has_exits
    ]
    found.sort(key=lambda pair: pair[0].ms)
    driver = found[0][1]
    tuning = Tuning(
        task.batch_size,
        task.order.precision,
        _device_name(task.device),
        torch.get_num_threads(),
        tuple(way for way, _ in found),
        plains["plain"],
        left_out,
        driver.latency,
    )
    return tuning, driver


def _set(driver: Any, latency: Latency | None, micro_batch: int) -> Driver:
    return replace(driver, latency=latency, micro_batch=micro_batch)


def _kept(path: Path) -> Tuning | None:
    """What was kept, or nothing where that is missing or damaged."""
    try:
        found = read_as(Tuning, read_json(path))
    except (FileFormatError, TypeError):
        return None
    return found if found.ways and found.chosen.backend in CANDIDATES else None


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
