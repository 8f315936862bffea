"""One figure of each of several runs, in words: the mean, the range, and how much stands behind them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from shallowdeep.studies.paper.layout import percent, signed, title_of_network
from shallowdeep.studies.results import CellResult
from shallowdeep.studies.tasks import title_of

TIE = 1e-9
"""Shares nearer than this are equal: one that is pooled from two halves can lie an ulp beside that of the whole."""

HALF_A_POINT = 0.005
"""Accuracies nearer than this count as equal: about one standard error of a share of 10,000 images."""
FEW = 3
"""Runs from which on their own spread says what a mean is worth."""

Figures = Sequence[tuple[CellResult, float]]


def reaches(value: float, bound: float) -> bool:
    """Whether a value is a bound or above it.

    >>> reaches(0.1 + 0.2 - 0.3, 0.0), reaches(0.3 - 0.2 - 0.1, 0.0), reaches(-0.001, 0.0)
    (True, True, False)
    """
    return value >= bound - TIE


def mean(figures: Figures) -> float:
    """Over the runs."""
    return statistics.fmean(value for _, value in figures)


def direction(figures: Figures) -> int:
    """The sign of the mean where it stands out, else 0.

    It stands out by two standard errors over the runs, taken as independent; of fewer than three, where each is
    further than half a point from zero, on the same side.
    """
    values = [value for _, value in figures]
    average = statistics.fmean(values)
    sign = 1 if average > 0 else -1
    if len(values) < FEW:
        return sign if all(sign * value > HALF_A_POINT + TIE for value in values) else 0
    return 0 if reaches(2 * statistics.stdev(values) / len(values) ** 0.5, abs(average)) else sign


def in_points(value: float) -> str:
    """A difference of two shares.

    >>> in_points(-0.012)
    '−1.20 points'
    """
    return f"{signed(100 * value)} points"


def in_per_cent(value: float) -> str:
    """A share.

    >>> in_per_cent(0.5)
    '50.0 %'
    """
    return f"{percent(value, 1)} %"


def summary(figures: Figures, written: Callable[[float], str]) -> str:
    """The mean and, of several runs, the range."""
    values = [value for _, value in figures]
    average = written(mean(figures))
    return average if len(values) == 1 else f"{average} on average ({written(min(values))} to {written(max(values))})"


def evidence(figures: Figures) -> str:
    """How many runs, of what, on how many images; and the spread over seeds where cells were run under several."""
    runs = [run for run, _ in figures]
    images = sorted({run.n_test for run in runs})
    counted = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    spread, cells = spread_over_seeds(figures)
    alone = "one seed" if len(runs) == 1 else "one seed each"
    between = f"±{100 * (spread or 0.0):.2f} points between the seeds of {counted_as(cells, 'cell')}"
    networks: dict[str, dict[str, None]] = {}
    for run in runs:
        networks.setdefault(title_of(run.config.data), {})[title_of_network(run.config.network)] = None
    what = "; ".join(f"{', '.join(names)} on {data}" for data, names in networks.items())
    return f"n = {counted_as(len(runs), 'run')} ({what}), {counted} test images, {alone if spread is None else between}"


def untested(figures: Figures, data: Sequence[str]) -> str:
    """A sentence on data sets that a claim is of and no run is; empty where there are none."""
    missing = [title_of(name) for name in data if all(run.config.data != name for run, _ in figures)]
    return f" Not tested on {' and '.join(missing)}." if missing else ""


def spread_over_seeds(figures: Figures) -> tuple[float | None, int]:
    """Standard deviation between runs that differ in their seed alone, pooled, and of how many cells.

    ``None``: no cell was run under several seeds.
    """
    groups: dict[tuple, list[float]] = {}
    for run, value in figures:
        groups.setdefault((run.strategy, *run.pair[:-1]), []).append(value)
    several = [statistics.variance(values) for values in groups.values() if len(values) > 1]
    return (statistics.fmean(several) ** 0.5 if several else None), len(several)


def counted_as(number: int, thing: str) -> str:
    """A number of things.

    >>> counted_as(1, "run"), counted_as(20, "epoch")
    ('1 run', '20 epochs')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
