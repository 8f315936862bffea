"""What an engine's stages take by themselves: the bounds that its own time is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shallowdeep.inference.engine import Engine
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.sizes import rows_at_a_time
from shallowdeep.inference.timing.speed import BOUND, LINEAR, STAGES


def stage_times(engine: Engine, batches: Sequence[Any], exits: Sequence[np.ndarray]) -> dict[str, float]:
    """What an engine's stages take by themselves for some batches, in milliseconds a batch.

    Every batch is timed once, and the mean is taken as it is of the engine's own calls: a median of short times would
    leave out a busy machine's pauses that the engine's mean holds.

    Args:
        engine: its stages are timed now.
        batches: of one size.
        exits: where the samples of each batch leave.

    Returns:
        ``BOUND``, ``LINEAR`` and ``STAGES``. Where the engine runs micro-batches, so are the stages timed.
    """
    found: dict[str, list[float]] = {BOUND: [], LINEAR: [], STAGES: []}
    for inputs, left in zip(batches, exits, strict=True):
        (driver, values), total = engine.ready(inputs), len(left)
        most = rows_at_a_time(driver, total)
        arriving = [int((left >= exit).sum()) for exit in engine.exits]
        sizes = {rows % most for rows in arriving} - {0} | {most}
        latency = driver.measure(values, sorted(sizes), repeats=1)
        full = [_stage_ms(latency, stage, total, most) for stage in range(len(arriving))]
        found[BOUND].append(sum(_stage_ms(latency, stage, rows, most) for stage, rows in enumerate(arriving)))
        found[LINEAR].append(sum(full[stage] * rows / total for stage, rows in enumerate(arriving)))
        found[STAGES].append(sum(full))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _stage_ms(latency: Latency, stage: int, rows: int, most: int) -> float:
    """Of a stage on some rows, run ``most`` at a time."""
    whole, rest = divmod(rows, most)
    return whole * latency.run(stage, most) + (latency.run(stage, rest) if rest else 0.0)
