"""Lanes timed in turn: in every round each once on the same samples, another one first each time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shallowdeep.data.pytrees import row_counts, take_rows
from shallowdeep.inference.answers import Answers
from shallowdeep.inference.timing.lanes import Lane
from shallowdeep.inference.timing.stage_times import stage_times

STAGE_BATCHES, STAGE_ROWS = 4, 64  # of a round, on which the stages alone are timed: so many batches or samples
WARM_ROWS = 32  # at most, answered before a lane's turn is timed, as after the others' turns it runs slower at first


@dataclass
class Tally:
    """What one lane took and answered at one batch size.

    Attributes:
        labels: answered, by sample; -1 where there is no answer.
        exits: where each sample left; -1 where there is no answer.
        costs: of each answer, as a share of the plain network.
        latencies_ms: of a batch, the mean of each round.
        stages_ms: of an engine's stages alone, by variant, the mean of each round.
    """

    labels: np.ndarray
    exits: np.ndarray
    costs: np.ndarray
    latencies_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)

    def note(self, rows: np.ndarray, answers: Answers) -> None:
        """Keep the answers of some samples."""
        self.labels[rows], self.exits[rows], self.costs[rows] = answers.labels, answers.exits, answers.costs


def time_in_turn(
    lanes: Sequence[Lane], images: Any, batch_size: int, rounds: int, advance: Callable[[], None]
) -> list[Tally]:
    """Time all lanes at one batch size.

    Args:
        lanes: what is timed.
        images: samples as rows; shared out among the rounds, as far as they go.
        batch_size: samples of a batch.
        rounds: times that each lane is timed.
        advance: called after each round.

    Returns:
        One tally per lane.
    """
    (num_samples,) = row_counts(images)
    num_batches = max(1, num_samples // (rounds * batch_size))  # of a round
    none = np.full(num_samples, -1)
    tallies = [Tally(none.copy(), none.copy(), np.zeros(num_samples)) for _ in lanes]
    first = take_rows(images, slice(0, batch_size))
    for lane in lanes:
        lane.run(first)
    for number in range(rounds):
        start = number * num_batches * batch_size
        rows = (start + np.arange(num_batches * batch_size)) % num_samples  # from the end it goes on at the beginning
        _round(number, lanes, tallies, images, rows.reshape(num_batches, batch_size))
        advance()
    return tallies


def _round(number: int, lanes: Sequence[Lane], tallies: Sequence[Tally], images: Any, rows: np.ndarray) -> None:
    batches = [take_rows(images, torch.from_numpy(part)) for part in rows]
    timed = max(STAGE_BATCHES, STAGE_ROWS // rows.shape[1])  # of these, for the stages alone
    warm = take_rows(batches[0], slice(0, WARM_ROWS))
    pairs = list(zip(lanes, tallies, strict=True))
    # In another order each round: whatever one leaves behind in waiting threads meets all the others.
    for lane, tally in (pairs[place] for place in np.random.default_rng(number).permutation(len(pairs))):
        lane.run(warm)
        begin = time.perf_counter()
        found = [lane.run(batch) for batch in batches]
        tally.latencies_ms.append(1e3 * (time.perf_counter() - begin) / len(batches))
        for part, answers in zip(rows, found, strict=True):
            if answers is not None:
                tally.note(part, answers)
        if lane.engine is not None:
            exits = [answers.exits for answers in found[:timed] if answers is not None]
            for name, value in stage_times(lane.engine, batches[:timed], exits).items():
                tally.stages_ms.setdefault(name, []).append(value)
