"""How long stages take, measured, and whether dropping rows pays by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def pays(latency: Latency | None, stage: int, kept: int, rows: int) -> bool:
    """Whether a stage is reached and run sooner with ``kept`` rows picked out of ``rows``; without a table it is."""
    if latency is None:
        return True
    return latency.take(stage, kept) + latency.run(stage, kept) < latency.run(stage, rows)
