"""The page's diagrams for papers: the same descriptions, drawn by matplotlib instead of the browser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shallowdeep.errors import require
from shallowdeep.report.plots.figure import Plot

WIDTH = 3.4
"""Inches; one column of a two-column paper."""
FONT = 7.5
STYLE = {
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "text.parse_math": False,  # names of classes and runs are no formulas
    "legend.fontsize": FONT - 1,
    "pdf.fonttype": 42,  # letters stay letters: journals refuse the other kind
    "svg.hashsalt": "shallowdeep",  # the same figure, the same file
}
MARKERS = {"none": "none", "circle": "o", "square": "s", "diamond": "D", "star": "*", "triangle-up": "^"}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
SIZE = 0.5
"""Points of a paper for a pixel of the page: of markers and of lines."""
LONG = 30
"""Letters; two columns of such names do not fit."""
BANDS = 0.9
"""Of the height of a diagram of bands, what all samples together take."""


def draw_plot(plot: Plot) -> Any:
    """A diagram as a matplotlib figure, one column wide, in the page's colours on white.

    Args:
        plot: any of ``make_plots``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = new_figure(WIDTH, plot.height / 380 * 0.7 * WIDTH)
    axes = figure.add_subplot()
    below: Sequence[float] | None = None
    for trace in plot.data:
        if trace["type"] == "bar":
            stacked = plot.layout.get("barmode") == "stack"
            _draw_bars(axes, trace, below if stacked else None)
            below = trace["y"] if below is None else [low + more for low, more in zip(below, trace["y"], strict=True)]
        elif trace["type"] == "sankey":
            _draw_bands(axes, trace)
        else:
            _draw_points(axes, trace)
    _draw_axes(axes, plot.layout)
    _draw_legend(figure, axes)
    return figure


def new_figure(width: float, height: float) -> Any:
    """An empty figure in the house's style, sides in inches."""
    figures = require("matplotlib.figure", extra="report")
    return figures.Figure(figsize=(width, height), layout="constrained")


def styled() -> Any:
    """A context in which figures are drawn and saved; matplotlib's settings are as before after it."""
    return require("matplotlib", extra="report").rc_context(STYLE)


@cache
def palette() -> Mapping[str, Any]:
    """The page's light colours by their names in its style sheet, each as matplotlib takes it."""
    sheet = (Path(__file__).parents[1] / "templates" / "page.css").read_text(encoding="utf-8")
    light = sheet[: sheet.index("}")]
    return {name: _colour(value) for name, value in re.findall(r"(--[\w-]+):\s*([^;]+);", light)}


def _colour(text: str) -> Any:
    numbers = re.fullmatch(r"rgba\((\d+), (\d+), (\d+), ([\d.]+)\)", text)
    if numbers is None:
        return text
    *parts, opacity = numbers.groups()
    return (*(int(part) / 255 for part in parts), float(opacity))


def _draw_points(axes: Any, trace: Mapping[str, Any]) -> None:
    joined, marker = "lines" in trace["mode"], trace.get("marker", {})
    colour = palette()[(trace["line"] if joined else marker)["color"]]
    symbol = marker.get("symbol", "none")
    (drawn,) = axes.plot(trace["x"], trace["y"], color=colour, label=trace["name"], linestyle="none")
    if joined:
        drawn.set(linestyle=DASHES[trace["line"]["dash"]], linewidth=SIZE * trace["line"]["width"])
    drawn.set(marker=MARKERS[symbol.removesuffix("-open")], markersize=SIZE * marker.get("size", 0))
    if symbol.endswith("-open"):
        drawn.set(markerfacecolor="none", markeredgewidth=SIZE * marker["line"]["width"])


def _draw_bars(axes: Any, trace: Mapping[str, Any], below: Sequence[float] | None) -> None:
    marker = trace["marker"]
    axes.bar(
        trace["x"],
        trace["y"],
        bottom=below,
        width=trace.get("width", 0.8),
        color=palette()[marker["color"]],
        alpha=trace.get("opacity"),
        hatch="/////" if "pattern" in marker else None,
        edgecolor=palette()["--paper"],
        linewidth=0,
        label=trace["name"],
    )


def _draw_bands(axes: Any, trace: Mapping[str, Any]) -> None:
    """Samples as bands between columns of nodes, each as thick as they are many."""
    link, node = trace["link"], trace["node"]
    ends = list(zip(link["source"], link["target"], link["value"], link["color"], strict=True))
    sizes = [max(sum(e[2] for e in ends if e[side] == number) for side in (0, 1)) for number in range(len(node["x"]))]
    columns: dict[float, float] = {}
    for x, size in zip(node["x"], sizes, strict=True):
        columns[x] = columns.get(x, 0.0) + size
    scale = BANDS / max(columns.values())
    tops = [1 - y + scale * size / 2 for y, size in zip(node["y"], sizes, strict=True)]
    leaving, arriving = list(tops), list(tops)
    for source, target, value, colour in ends:
        thick = scale * value
        left, right = node["x"][source], node["x"][target]
        _draw_band(axes, (left, leaving[source]), (right, arriving[target]), thick, palette()[colour])
        leaving[source] -= thick
        arriving[target] -= thick
    labels = dict(trace["meta"])
    for x, top, size, colour in zip(node["x"], tops, sizes, node["color"], strict=True):
        name = labels.pop(colour, None)  # each stands in the legend once
        axes.bar(x, scale * size, bottom=top - scale * size, width=0.015, color=palette()[colour], label=name)
    axes.set(xlim=(-0.01, 1.01), ylim=(0, 1))
    axes.set_axis_off()


def _draw_band(axes: Any, start: tuple[float, float], end: tuple[float, float], thick: float, colour: Any) -> None:
    paths, patches = (require(f"matplotlib.{name}", extra="report") for name in ("path", "patches"))
    (x0, y0), (x1, y1), middle = start, end, (start[0] + end[0]) / 2
    points = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    points += [(x, y - thick) for x, y in reversed(points)] + [(x0, y0)]
    move, to, curve = paths.Path.MOVETO, paths.Path.LINETO, paths.Path.CURVE4
    codes = [move, curve, curve, curve, to, curve, curve, curve, to]
    axes.add_patch(patches.PathPatch(paths.Path(points, codes), facecolor=colour, edgecolor="none"))


def _draw_axes(axes: Any, layout: Mapping[str, Any]) -> None:
    for side, asked in (("x", layout.get("xaxis", {})), ("y", layout.get("yaxis", {}))):
        if "title" in asked:
            axes.set(**{f"{side}label": asked["title"]["text"]})
        if "range" in asked:
            axes.set(**{f"{side}lim": asked["range"]})
        elif asked.get("rangemode") == "tozero":
            axes.set(**{f"{side}lim": (0, None)})
        if "dtick" in asked:
            low, high = asked["range"]
            axes.set(**{f"{side}ticks": [*range(int(low), int(high) + 1, asked["dtick"])]})
    axes.grid(axis="y" if layout.get("xaxis", {}).get("type") == "category" else "both", color=palette()["--grid"])
    for shape in layout.get("shapes", []):
        _draw_line(axes, shape)
    for note in layout.get("annotations", []):
        _draw_note(axes, note)


def _draw_legend(figure: Any, axes: Any) -> None:
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        columns = 1 if max(map(len, names)) > LONG else 2
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.0, labelspacing=0.5)


def _draw_line(axes: Any, shape: Mapping[str, Any]) -> None:
    line = shape["line"]
    axes.plot(
        (shape["x0"], shape["x1"]),
        (shape["y0"], shape["y1"]),
        transform=_place(axes, shape),
        color=palette()[line["color"]],
        linestyle=DASHES[line["dash"]],
        linewidth=SIZE * line["width"],
        scalex=False,
        scaley=False,
    )


def _draw_note(axes: Any, note: Mapping[str, Any]) -> None:
    colour = palette()[note.get("font", {}).get("color", "--ink")]
    sides = {"ha": note["xanchor"], "va": note["yanchor"]}
    axes.text(note["x"], note["y"], note["text"], transform=_place(axes, note), color=colour, **sides)


def _place(axes: Any, thing: Mapping[str, Any]) -> Any:
    """Where a shape's numbers count from: the data, or the paper's edges."""
    on_paper = {name: thing.get(f"{name}ref") == "paper" for name in "xy"}
    if on_paper["x"]:
        return axes.transAxes
    return axes.get_xaxis_transform() if on_paper["y"] else axes.transData
