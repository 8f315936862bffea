"""What all diagrams are made of: one figure, its colours by the style sheet's names, points and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RIGHT, WRONG, LOST = "--right", "--wrong", "--lost"
MAIN, ORACLE, QUIET, INK, POLICY = "--main", "--oracle", "--quiet", "--ink", "--policy"
HATCHED = {"pattern": {"shape": "/", "fillmode": "overlay", "fgcolor": "--paper", "size": 7, "solidity": 0.2}}
"""A second sign beside the colour, for the wrong ones."""


@dataclass(frozen=True)
class Plot:
    """One diagram.

    Attributes:
        data: plotly's traces.
        layout: plotly's, over the page's own.
        label: what it shows, for those who do not see it.
        height: in pixels.
    """

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    label: str
    height: int = 380

    def to_dict(self) -> dict[str, Any]:
        """What the browser draws."""
        return {"data": self.data, "layout": self.layout}


def percents(values: Sequence[float]) -> list[float]:
    """Shares in per cent, as the page needs them.

    >>> percents([0.123456789])
    [12.3457]
    """
    return [round(100 * value, 4) for value in values]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def points(
    name: str, x: Sequence[float], y: Sequence[float], colour: str, symbol: str, hover: Sequence[str], size: int = 10
) -> dict[str, Any]:
    """Points of accuracy against cost, shares in [0, 1], each with words of its own when pointed at."""
    edge = {"color": colour, "width": 3} if symbol.endswith("open") else {"color": "--paper", "width": 1}
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": percents(x), "y": percents(y), "text": list(hover),
        "hovertemplate": "%{text}<br>cost %{x:.1f} %, %{y:.2f} %<extra></extra>",
        "marker": {"color": colour, "symbol": symbol, "size": size, "line": edge},
    }  # fmt: skip


def line(
    name: str, x: Sequence[float], y: Sequence[float], colour: str, dash: str, thresholds: Sequence[float]
) -> dict[str, Any]:
    """A curve of accuracy against cost, shares in [0, 1], that tells its threshold when pointed at."""
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": percents(x), "y": percents(y),
        "customdata": [round(threshold, 5) for threshold in thresholds],
        "hovertemplate": "threshold %{customdata:.4f}<br>cost %{x:.1f} %, %{y:.2f} %<extra></extra>",
        "line": {"color": colour, "width": 2.5, "dash": dash},
    }  # fmt: skip
