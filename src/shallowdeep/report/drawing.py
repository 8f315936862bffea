"""A drawing of a network: its backbone from top to bottom by FLOPs, and where its exits leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROW = 46  # pixels that an exit's two lines take
MARGIN = 26


@dataclass(frozen=True)
class Branch:
    """An exit in the drawing, in pixels from the top.

    Attributes:
        exit: its number.
        leaves_at: where on the backbone it sits.
        row: where its text begins.
    """

    exit: int
    leaves_at: float
    row: float


@dataclass(frozen=True)
class Drawing:
    """Where everything is, in pixels.

    Attributes:
        height: of the drawing.
        top: of the backbone.
        length: of the backbone; proportional to its FLOPs.
        branches: exits, shallow to deep.
    """

    height: float
    top: float
    length: float
    branches: tuple[Branch, ...]


def draw(depths: Sequence[float]) -> Drawing:
    """Lay out a network's exits so that no two texts overlap.

    Args:
        depths: FLOPs of the backbone up to each exit, as a share of all of it, rising; the last is 1.

    >>> [round(branch.row) for branch in draw([0.1, 0.12, 1.0]).branches]
    [50, 96, 266]
    """
    length = max(1.1 * len(depths) * ROW, 240.0)
    rows: list[float] = []
    for depth in depths:  # as near to its place as the rows above allow …
        rows.append(max(depth * length, rows[-1] + ROW if rows else 0.0))
    for place in reversed(range(len(rows))):  # … and none below the end
        below = rows[place + 1] - ROW if place + 1 < len(rows) else length
        rows[place] = min(rows[place], below)
    branches = tuple(
        Branch(exit, MARGIN + depth * length, MARGIN + row)
        for exit, (depth, row) in enumerate(zip(depths, rows, strict=True))
    )
    return Drawing(length + ROW + 2 * MARGIN, float(MARGIN), length, branches)
