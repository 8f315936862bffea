"""Accuracy against cost: of one run with all it compares to, and of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from shallowdeep.policies.replay import Curve
from shallowdeep.policies.rules import Confidence
from shallowdeep.report.content import Chapter
from shallowdeep.report.early import EarlyExits
from shallowdeep.report.missing import Missing
from shallowdeep.report.plots.figure import INK, LOST, MAIN, ORACLE, POLICY, QUIET, RIGHT, Plot, axis, line, points

SERIES = ("--main", "--wrong", "--right", "--oracle", "--lost", "--other")
DASHES = ("solid", "dash", "dot", "dashdot")


def accuracy_against_cost(chapter: Chapter, early: EarlyExits, beside: Sequence[Chapter]) -> Plot:
    """Every threshold's accuracy and cost, beside what they compare to.

    The last of the figure's traces is the operating point, which the slider moves.

    Args:
        chapter: of a run.
        early: of the same.
        beside: plain networks of the same name, trained and measured on the same data.
    """
    curve, start = thinned(early.curve), early.start
    data = [
        line("every threshold", curve.cost.tolist(), curve.accuracy.tolist(), MAIN, "solid", curve.thresholds.tolist())
    ]
    shallow = early.exits[:-1]
    data.append(
        points("this network cut off at an exit", [e.alone for e in shallow], [e.accuracy for e in shallow],
                QUIET, "square", [f"{e.name} {e.tap}: a network cut off here" for e in shallow], 8)
    )  # fmt: skip
    data.append(points("the whole network, no exits", [1.0], [chapter.accuracy], INK, "diamond",
                        ["the whole network without exits"], 12))  # fmt: skip
    data += [
        points(f"a plain run: {one.name}", [1.0], [one.accuracy], INK, "diamond-open", [f"a plain run: {one.name}"], 13)
        for one in beside
    ]
    if not isinstance(early.oracle, Missing):
        data.append(points("oracle: leaves at the first right exit", [early.oracle.cost], [early.oracle.accuracy],
                            ORACLE, "star", ["oracle"], 14))  # fmt: skip
    data += _chosen(early)
    here = start.decisions
    label = "threshold above" if start.chosen else "nobody leaves early"
    data.append(points(label, [here.cost], [here.accuracy], POLICY, "circle", [label], 15))
    answers = "right answers" if chapter.measure == "accuracy" else "answers as the last exit's"
    layout = {
        "xaxis": axis("mean cost, % of the whole network", rangemode="tozero"),
        "yaxis": axis(f"{answers}, %"),
        "hovermode": "closest",
    }
    what = f"{chapter.measure.capitalize()} against mean cost at every threshold, beside the whole network"
    return Plot(data, layout, f"{what} and smaller networks. The tables below have the main points.", 460)


def _chosen(early: EarlyExits) -> list[dict[str, Any]]:
    """The run's policy and the thresholds of budgets, at what they come to on the samples reported."""
    data = []
    if not isinstance(early.budgets, Missing):
        rows = [row for row in early.budgets.table if row.accuracy is not None and row.cost is not None]
        names = ["any cost" if row.budget is None else f"at most {100 * row.budget:.0f} % of the cost" for row in rows]
        data.append(points("thresholds from validation data", [row.cost or 0.0 for row in rows],
                            [row.accuracy or 0.0 for row in rows], RIGHT, "triangle-up", names, 12))  # fmt: skip
    decisions = early.start.decisions if early.start.chosen else None
    name = "the run's policy" if isinstance(early.policy, Confidence) else "where the slider starts"
    if early.other is not None:
        decisions, name = early.other.decisions, f"the run's policy ({early.other.policy.kind})"
    if decisions is not None:
        data.append(points(name, [decisions.cost], [decisions.accuracy], LOST, "circle-open", [name], 22))
    return data


def side_by_side(chapters: Sequence[Chapter]) -> Plot:
    """The curves of several runs in one figure."""
    data = []
    for number, chapter in enumerate(chapters):
        colour = SERIES[number % len(SERIES)]
        if chapter.early is None:
            data.append(points(chapter.name, [1.0], [chapter.accuracy], colour, "diamond", [chapter.name], 12))
            continue
        curve = thinned(chapter.early.curve)
        dash = DASHES[number % len(DASHES)]
        data.append(
            line(chapter.name, curve.cost.tolist(), curve.accuracy.tolist(), colour, dash, curve.thresholds.tolist())
        )
    layout = {
        "xaxis": axis("mean cost, % of each run's whole network", rangemode="tozero"),
        "yaxis": axis("right answers, %"),
    }  # fmt: skip
    return Plot(data, layout, "Accuracy against mean cost of all runs; figures in the table.", 420)


def thinned(curve: Curve, most: int = 1000) -> Curve:
    """So many points of a curve, evenly along its cost; its ends and its most accurate point stay.

    Args:
        curve: thresholds rising, and so its costs.
        most: points, at least 3.
    """
    if len(curve.cost) <= most:
        return curve
    wanted = torch.linspace(curve.cost[0].item(), curve.cost[-1].item(), most - 2, dtype=torch.float64)
    near = torch.searchsorted(curve.cost, wanted).clamp(max=len(curve.cost) - 1)
    ends = torch.tensor([0, len(curve.cost) - 1, int(curve.accuracy.argmax())])
    kept = torch.cat([near, ends]).unique()
    return replace(curve, thresholds=curve.thresholds[kept], accuracy=curve.accuracy[kept], cost=curve.cost[kept])
