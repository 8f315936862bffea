"""The back ends timed in turns, and the fastest chosen; what was chosen is kept in the user's cache folder."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shallowdeep.data.files.cache import cache_folder
from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.inference.backends import BACKENDS, Driver, why_not
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.sizes import built_for, powers_up_to
from shallowdeep.inference.tuning.result import TunedWay, Tuning
from shallowdeep.inference.tuning.task import Task
from shallowdeep.progress import track
from shallowdeep.storage import read_as, read_json, write_json


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
            driver = task.build(found.chosen.backend, without_exits=not found.chosen.leaves_early)
            return found, _set(driver, found.latency, found.chosen.micro_batch)
        except Exception:  # it could be built when it was chosen; timing says why it cannot any more
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
    lanes, left_out = _prepared(task)
    taken = np.zeros((len(lanes), task.repeats))
    for repeat in track(range(task.repeats), task.repeats, "timing", shown=task.progress):
        for place, lane in enumerate(lanes):  # in turns: a slower moment of the machine meets all of them
            if lane.backend not in left_out:
                try:
                    taken[place, repeat] = lane.run()
                except Exception as error:
                    left_out[lane.backend] = why_not(error)
    kept = [place for place, lane in enumerate(lanes) if lane.backend not in left_out]
    return _chosen(task, [lanes[place] for place in kept], taken[kept], left_out)


def _prepared(task: Task) -> tuple[list[_Lane], dict[str, str]]:
    """What is to be timed, and why the rest is not: a run time may fail in any way, and the others are timed."""
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
        except Exception as error:
            left_out[name] = why_not(error)
    return lanes, left_out


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
    sizes = built_for(driver)
    if not sizes:
        return powers_up_to(most)
    within = [size for size in sizes if size < most]
    return [*within, *sizes[len(within) : len(within) + 1]]  # and the one that a batch is filled up to


def _chosen(task: Task, lanes: Sequence[_Lane], taken: np.ndarray, left_out: dict[str, str]) -> tuple[Tuning, Driver]:
    """The fastest lane, among all those timed.

    Raises:
        ConfigError: none of them has exits.
    """
    if not any(lane.has_exits for lane in lanes):
        raise ConfigError("no back end can run here: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    median = np.median(taken, axis=1)
    low, high = np.quantile(taken, [0.25, 0.75], axis=1)
    plains: dict[str, float] = {}
    for lane, ms in zip(lanes, median.tolist(), strict=True):
        if not lane.has_exits:
            plains[lane.backend] = min(ms, plains.get(lane.backend, ms))
    if "plain" in plains:
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
                lane.has_exits,
            ),
            lane.driver,
        )
        for place, lane in enumerate(lanes)
        if lane.has_exits or task.allow_plain
    ]
    found.sort(key=lambda pair: (pair[0].ms, not pair[0].leaves_early))
    driver = found[0][1]
    tuning = Tuning(
        task.batch_size,
        task.order.precision,
        task.device_name,
        torch.get_num_threads(),
        tuple(way for way, _ in found),
        plains.get("plain"),
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
    usable = all(way.backend in BACKENDS for way in found.ways) and any(way.leaves_early for way in found.ways)
    return found if usable else None
