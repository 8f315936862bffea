"""Who is right where: how samples move between right and wrong from exit to exit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.errors import TraceError
from shallowdeep.traces.trace import Trace

STATES = ("right", "lost", "not yet right")
"""A sample at an exit: answered rightly; wrongly, though an earlier exit was right; wrongly, as by all before."""


@dataclass(frozen=True)
class Flows:
    """Samples by state at each exit, and how they move from one exit to the next.

    Attributes:
        exits: that are looked at, shallow to deep.
        counts: samples in each of ``STATES``, exit by exit.
        moves: from each of ``exits`` but the last to the next: samples from state (row) to state (column).
    """

    exits: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    moves: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def gained(self) -> tuple[int, ...]:
        """Samples that each exit but the first looked at gets right and the one before it wrong."""
        return tuple(move[1][0] + move[2][0] for move in self.moves)

    @property
    def lost(self) -> tuple[int, ...]:
        """Samples that each exit but the first looked at gets wrong and the one before it right."""
        return tuple(move[0][1] for move in self.moves)


def measure_flows(trace: Trace, exits: tuple[int, ...] | None = None) -> Flows:
    """Count who is right, lost and not yet right at some exits, and who changes between them.

    Args:
        trace: with labels.
        exits: to look at; ``None``: all. Whether a sample was right before is asked of all exits.

    Raises:
        TraceError: the Trace has no labels, or one exit alone.

    >>> trace = Trace.from_logits([[[2.0, 0.0]], [[0.0, 1.0]]], labels=[0], costs=[0.4, 1.0])
    >>> measure_flows(trace).moves
    (((0, 1, 0), (0, 0, 0), (0, 0, 0)),)
    """
    if trace.num_exits < 2:
        raise TraceError("samples move between exits, and this Trace has only the last one.")
    states = _states(trace)
    looked_at = tuple(range(trace.num_exits)) if exits is None else exits
    columns = [states[:, exit] for exit in looked_at]
    return Flows(
        looked_at,
        tuple(tuple(column.bincount(minlength=3).tolist()) for column in columns),
        tuple(_moves(before, after) for before, after in pairwise(columns)),
    )


def _states(trace: Trace) -> Int[Tensor, "n exits"]:
    right = trace.correct
    known = right.int().cummax(1).values.bool()
    return torch.where(right, 0, torch.where(known, 1, 2))


def _moves(before: Int[Tensor, " n"], after: Int[Tensor, " n"]) -> tuple[tuple[int, ...], ...]:
    counts = (3 * before + after).bincount(minlength=9).view(3, 3)
    return tuple(tuple(row) for row in counts.tolist())
