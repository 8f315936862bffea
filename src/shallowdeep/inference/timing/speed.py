"""What a benchmark of early exits found: times that were taken side by side, and their ratios."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.errors import ConfigError, require
from shallowdeep.inference.backends import MICRO_BATCH, PRECISIONS
from shallowdeep.storage import replacing

EXITS, PLAIN, NOBODY, ALL_EXITS = "early exits", "plain", "nobody exits", "all exits"
BOUND, LINEAR, STAGES, ONE_AT_A_TIME = "bound", "linear bound", "sum of stages", "one at a time"
WHOLE_BATCH, IN_PARTS, BARE = "plain, whole batch", f"plain, {MICRO_BATCH} at a time", "bare"
VARIANTS = {
    EXITS: "the engine, each sample leaving where its policy lets it",
    PLAIN: "the same network without exits, in the same run time and precision: the faster of the next two",
    WHOLE_BATCH: "the same, a batch in one call",
    IN_PARTS: f"the same, {MICRO_BATCH} samples in a call; where batches are larger than that",
    BARE: "the same as one runs it without this package, a batch in one call: torch.compile(network), or a session of "
    "ONNX Runtime with its own defaults (threads spin while they wait)",
    NOBODY: "the engine with every sample sent to the last exit",
    ALL_EXITS: "the full Shallow-Deep Network in one graph, all exits and no policy, as many samples in a call as the "
    "engine takes",
    BOUND: "the measured stage times at the row counts that arrive, summed",
    LINEAR: "the stage times of the full batch times the share of rows that arrive, summed",
    STAGES: "the stage times of the full batch, summed",
    ONE_AT_A_TIME: "samples one after another, Python asking after each exit",
}


def static(exit: int) -> str:
    """Name of the variant that ends at an exit for every sample: a smaller network without exits."""
    return f"ends at exit {exit}"


@dataclass(frozen=True)
class Spread:
    """A figure that was taken several times.

    Attributes:
        median: of all.
        low: a quarter of them lies below.
        high: a quarter of them lies above.
        n: how many there are.
    """

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}–{self.high:.3g})"


def spread(values: Any) -> Spread:
    """Median and quartiles.

    >>> print(spread([1.0, 2.0, 3.0, 4.0, 5.0]))
    3 (2–4)
    """
    low, median, high = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75]).tolist()
    return Spread(median, low, high, len(values))


@dataclass(frozen=True)
class Timing:
    """One thing that was timed, at one batch size.

    Attributes:
        batch_size: of its samples.
        backend: what ran it.
        precision: of weights and arithmetic.
        variant: a key of ``VARIANTS``, or that of a smaller network.
        latencies_ms: of a batch, the mean of a round; rounds stand in the same order everywhere.
        n: samples that were answered, each counted once; 0 where there are no answers.
        accuracy: of those answers.
        cost: their mean cost, as a share of the plain network.
        exit_shares: of those answers, by exit.
        differing: fp32 with exits alone: answers that are not the replay's.
        ties: of those, how many lie so near to a threshold that rounding decides.
        device: that it ran on.
    """

    batch_size: int
    backend: str
    precision: str
    variant: str
    latencies_ms: tuple[float, ...]
    n: int = 0
    accuracy: float | None = None
    cost: float | None = None
    exit_shares: tuple[float, ...] | None = None
    differing: int | None = None
    ties: int | None = None
    device: str = ""

    @property
    def latency_ms(self) -> Spread:
        """Of a batch, over the rounds."""
        return spread(self.latencies_ms)


@dataclass(frozen=True)
class LeftOut:
    """What could not be timed.

    Attributes:
        backend: what should have run it.
        precision: of weights and arithmetic.
        variant: what should have been run; empty: the whole back end.
        reason: why not.
    """

    backend: str
    precision: str
    variant: str
    reason: str

    def __str__(self) -> str:
        name = " ".join(part for part in (self.backend, self.precision, self.variant) if part)
        return f"not measured: {name}: {self.reason}"


@dataclass(frozen=True)
class SpeedReport:
    """Times of early exits and of what they compare to, taken in turn in one process.

    Figures that count are ratios within a round: a slower moment of the machine meets both sides of them.

    Attributes:
        timings: everything timed.
        left_out: what could not be, and why.
        policies: by precision, as they are written.
        exit_accuracies: of each exit alone in fp32, the last being the plain network's.
        exit_costs: of a network that ends at each exit, as a share of the plain one.
        rounds: of each figure.
        threads: on the CPU.
        device: the network's; each timing says its own.
        versions: of the run times.
    """

    timings: tuple[Timing, ...]
    left_out: tuple[LeftOut, ...]
    policies: Mapping[str, Any]
    exit_accuracies: tuple[float, ...]
    exit_costs: tuple[float, ...]
    rounds: int
    threads: int
    device: str
    versions: Mapping[str, str]

    @property
    def name(self) -> str:
        """What its files are called: ``"bench"``, with the device and precisions where they are not CPU and fp32.

        >>> one = Timing(8, "onnx", "int8", EXITS, (1.0,))
        >>> SpeedReport((one,), (), {}, (), (), 1, 1, "cuda:0", {}).name
        'bench-cuda-int8'
        """
        kind = self.device.partition(":")[0]
        timed = sorted({one.precision for one in self.engines}, key=list(PRECISIONS).index)
        return "-".join(["bench", *([] if kind == "cpu" else [kind]), *([] if timed == ["fp32"] else timed)])

    @property
    def engines(self) -> list[Timing]:
        """The engines with their exits, by batch size."""
        return [timing for timing in self.timings if timing.variant == EXITS]

    def find(self, batch_size: int, backend: str, precision: str, variant: str) -> Timing | None:
        """One timing, where it was taken."""
        wanted = (batch_size, backend, precision, variant)
        return next((t for t in self.timings if (t.batch_size, t.backend, t.precision, t.variant) == wanted), None)

    def ratio(self, timing: Timing | None, other: Timing | None) -> Spread | None:
        """Time over time, round by round; ``None`` where one of the two was not taken."""
        if timing is None or other is None:
            return None
        return spread(np.divide(timing.latencies_ms, other.latencies_ms))

    def beside(self, timing: Timing, variant: str) -> Timing | None:
        """Another variant at the same batch size, in the same run time and precision."""
        return self.find(timing.batch_size, timing.backend, timing.precision, variant)

    def rows(self) -> list[dict[str, Any]]:
        """One row per engine: against the same network without exits, and what it answers."""
        return [
            {
                **_key(one),
                "ms a batch": one.latency_ms,
                "of plain": self.ratio(one, self.beside(one, PLAIN)),
                "of bare": self.ratio(one, self.beside(one, BARE)),
                "of eager plain": self.ratio(one, self.find(one.batch_size, "eager", "fp32", PLAIN)),
                "× one at a time": self.ratio(self.find(one.batch_size, "eager", "fp32", ONE_AT_A_TIME), one),
                "accuracy": one.accuracy,
                "plain": None if (plain := self.beside(one, PLAIN)) is None else plain.accuracy,
                "cost": one.cost,
                "n": one.n,
            }
            for one in self.engines
        ]

    def bound_rows(self) -> list[dict[str, Any]]:
        """One row per engine: against what its stages take, and whether it answers as replay does."""
        return [
            {
                **_key(one),
                "of bound": self.ratio(one, self.beside(one, BOUND)),
                "of linear bound": self.ratio(one, self.beside(one, LINEAR)),
                "stages / all exits": self.ratio(self.beside(one, STAGES), self.beside(one, ALL_EXITS)),
                "nobody / all exits": self.ratio(self.beside(one, NOBODY), self.beside(one, ALL_EXITS)),
                "unlike replay": one.differing,
                "of them ties": one.ties,
            }
            for one in self.engines
        ]

    def static_rows(self) -> list[dict[str, Any]]:
        """One row per smaller network: one that ends at an exit for every sample, beside the engine."""
        return [
            {
                **_key(small),
                "ends at": exit,
                "cost": self.exit_costs[exit],
                "accuracy": small.accuracy,
                "of plain": self.ratio(small, self.beside(small, PLAIN)),
                "exits' accuracy": one.accuracy,
                "exits' of plain": self.ratio(one, self.beside(one, PLAIN)),
            }
            for one, exit, small in self._smaller()
        ]

    def _smaller(self) -> Iterator[tuple[Timing, int, Timing]]:
        for one in self.engines:
            for exit in range(len(self.exit_costs) - 1):
                small = self.beside(one, static(exit))
                if small is not None:
                    yield one, exit, small

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values: every round's times, and the ratios that the tables show."""
        return {
            "rounds": self.rounds,
            "threads": self.threads,
            "device": self.device,
            "run_times": dict(self.versions),
            "policies": dict(self.policies),
            "exit_accuracies": list(self.exit_accuracies),
            "exit_costs": list(self.exit_costs),
            "variants": VARIANTS,
            "engines": [_plain(row) for row in self.rows()],
            "bounds": [_plain(row) for row in self.bound_rows()],
            "smaller_networks": [_plain(row) for row in self.static_rows()],
            "left_out": [vars(one) for one in self.left_out],
            "timings": [{**vars(one), "latency_ms": vars(one.latency_ms)} for one in self.timings],
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw time over the plain network's against batch size, and the bound of it, as PNG, SVG or PDF.

        Args:
            path: its ending says the format; replaced when it exists.

        Raises:
            MissingExtra: matplotlib is not installed.
            ConfigError: it does not draw that format.
        """
        draw_speed(self, Path(path))

    def __str__(self) -> str:
        lines = []
        for one in self.engines:
            name = f"batch {one.batch_size}, {one.backend} {one.precision}"
            ratio = self.ratio(one, self.beside(one, PLAIN))
            time = f"{one.latency_ms} ms a batch" if ratio is None else f"{ratio} of the time without exits"
            right = f"{100 * (one.accuracy or 0):.2f} % right on {one.n} samples"
            lines.append(f"{name}: {time}, {right} at {100 * (one.cost or 0):.1f} % of the cost.")
        lines += [str(one) for one in self.left_out]
        devices = ", ".join(dict.fromkeys(one.device for one in self.engines))
        lines.append(f"Medians of {self.rounds} rounds and the middle half of them, on {devices or self.device}.")
        return "\n".join(lines)


def _key(timing: Timing) -> dict[str, Any]:
    return {
        "back end": timing.backend,
        "precision": timing.precision,
        "device": timing.device,
        "batch": timing.batch_size,
    }


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: vars(value) if isinstance(value, Spread) else value for name, value in row.items()}


def draw_speed(report: SpeedReport, path: Path) -> None:
    """Draw a report; see ``SpeedReport.plot``."""
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(8.0, 4.4), layout="constrained")
    kind = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ConfigError(f"cannot draw {path.name}: name a file that ends in .{', .'.join(sorted(known))}.")
    axes = figure.add_subplot()
    sizes = sorted({one.batch_size for one in report.engines})
    names = list(dict.fromkeys((one.backend, one.precision) for one in report.engines))
    for place, (backend, precision) in enumerate(names):
        colour = f"C{place % 10}"
        measured, bounds = _against_plain(report, backend, precision)
        if not measured:
            continue
        # side by side, so that no error bar hides another
        shift = 2 ** (0.06 * (place - (len(names) - 1) / 2))
        x = [size * shift for size in measured]
        y = [found.median for found in measured.values()]
        errors = [[found.median - found.low for found in measured.values()]]
        errors.append([found.high - found.median for found in measured.values()])
        axes.errorbar(x, y, errors, marker="o", capsize=3, color=colour, label=f"{backend} {precision}")
        axes.plot([size * shift for size in bounds], [b.median for b in bounds.values()], "--", color=colour, lw=1)
    axes.axhline(1.0, color="0.4", lw=1)
    axes.plot([], [], "--", color="0.4", lw=1, label="its stages' times alone")
    costs = sorted({round(one.cost, 6) for one in report.engines if one.cost is not None and one.precision == "fp32"})
    if costs:
        axes.axhline(float(np.mean(costs)), color="0.4", lw=1, ls=":", label="FLOPs over the plain network's")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("time / time of the same network without exits")
    axes.set_title(f"Median and middle half of {report.rounds} rounds; {report.device}", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with replacing(path) as partial:
        figure.savefig(partial, format=kind, dpi=150)


def _against_plain(report: SpeedReport, backend: str, precision: str) -> tuple[dict[int, Spread], dict[int, Spread]]:
    """Of one back end by batch size: the engine over the plain network, and its bound over it."""
    measured, bounds = {}, {}
    for one in report.engines:
        if (one.backend, one.precision) == (backend, precision):
            plain = report.beside(one, PLAIN)
            found, bound = report.ratio(one, plain), report.ratio(report.beside(one, BOUND), plain)
            measured |= {} if found is None else {one.batch_size: found}
            bounds |= {} if bound is None else {one.batch_size: bound}
    return dict(sorted(measured.items())), dict(sorted(bounds.items()))
