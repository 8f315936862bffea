"""How long the forms of an exported folder take, and whether samples that leave early take less."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.inference.cascade import Values
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.manifest import FORMS
from shallowdeep.inference.runner.sessions import RunnerError, Settings


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
