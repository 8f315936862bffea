"""Confusion and confidence as alarms for wrong answers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from shallowdeep.analysis.detection import Roc
from shallowdeep.report.plots.figure import HATCHED, MAIN, QUIET, RIGHT, WRONG, Plot, axis, percents
from shallowdeep.report.suspicion import Suspicion
from shallowdeep.report.words import signed

SCORES = {"confusion": (MAIN, "solid"), "max-softmax": (WRONG, "dash")}
SHOWN_AS = {"confusion": "confusion", "max-softmax": "confidence"}


def confusion_histogram(suspicion: Suspicion) -> Plot:
    """How confusion spreads over right and over wrong answers, with both means."""
    histogram, found = suspicion.histogram, suspicion.found
    middle = [(low + high) / 2 for low, high in pairwise(histogram.edges)]
    width = histogram.edges[1] - histogram.edges[0]
    groups = (
        ("right answers", histogram.right, RIGHT, found.mean_correct, {}, 1.0),
        ("wrong answers", histogram.wrong, WRONG, found.mean_wrong, HATCHED, 0.9),
    )
    data: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for name, shares, colour, mean, pattern, height in groups:
        data.append({
            "type": "bar", "name": name, "x": middle, "y": percents(shares), "width": width, "opacity": 0.65,
            "marker": {"color": colour, **pattern},
            "hovertemplate": "confusion %{x:.2f}: %{y:.1f} %<extra>" + name + "</extra>",
        })  # fmt: skip
        means.append({
            "type": "line", "x0": mean, "x1": mean, "y0": 0, "y1": height, "yref": "paper",
            "line": {"color": colour, "width": 2, "dash": "dash"},
        })  # fmt: skip
        notes.append({
            "x": mean, "y": height, "yref": "paper", "xanchor": "left", "yanchor": "top", "showarrow": False,
            "text": f" mean {signed(mean)}", "font": {"color": colour},
        })  # fmt: skip
    room_for_notes = 130 * max(histogram.right + histogram.wrong)
    layout = {
        "barmode": "overlay", "shapes": means, "annotations": notes, "bargap": 0,
        "xaxis": axis("confusion, 0: usual on training data"),
        "yaxis": axis("of the group, %", range=[0, room_for_notes]),
    }  # fmt: skip
    return Plot(data, layout, "How confusion spreads over right and over wrong answers, with both means.", 340)


def roc_curves(curves: dict[str, Roc]) -> Plot:
    """Both scores as alarms."""
    data = [
        {"type": "scatter", "mode": "lines", "name": SHOWN_AS[name], "x": percents(curve.fpr), "y": percents(curve.tpr),
         "line": {"color": SCORES[name][0], "dash": SCORES[name][1], "width": 2.5},
         "hovertemplate": "%{y:.1f} % of the wrong, %{x:.1f} % of the right<extra>" + SHOWN_AS[name] + "</extra>"}
        for name, curve in curves.items()
    ]  # fmt: skip
    chance = {
        "type": "line",
        "x0": 0,
        "y0": 0,
        "x1": 100,
        "y1": 100,
        "line": {"color": QUIET, "width": 1, "dash": "dot"},
    }
    layout = {
        "shapes": [chance], "xaxis": axis("right answers with an alarm, %", range=[0, 101], dtick=20),
        "yaxis": axis("wrong answers with an alarm, %", range=[0, 101]),
    }  # fmt: skip
    return Plot(data, layout, "ROC curves of confusion and confidence as alarms for wrong answers.", 340)


def risk_against_coverage(suspicion: Suspicion) -> Plot:
    """Errors left where only the least suspicious samples are answered."""
    data = [
        {"type": "scatter", "mode": "lines", "name": SHOWN_AS[name], "x": percents(curve.coverage),
         "y": percents(curve.risk), "line": {"color": SCORES[name][0], "dash": SCORES[name][1], "width": 2.5},
         "hovertemplate": "%{x:.0f} % answered, %{y:.1f} % of them wrong<extra>" + SHOWN_AS[name] + "</extra>"}
        for name, curve in suspicion.risks.items()
    ]  # fmt: skip
    layout = {
        "xaxis": axis("samples answered, least suspicious first, %", range=[0, 101], dtick=20),
        "yaxis": axis("wrong among them, %", rangemode="tozero"),
    }  # fmt: skip
    return Plot(data, layout, "Risk against coverage for confusion and confidence.", 340)
