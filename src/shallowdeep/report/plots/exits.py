"""What happens at each exit: who leaves, who is right, who is lost."""

from __future__ import annotations

from typing import Any

from shallowdeep.report.early import EarlyExits
from shallowdeep.report.flows import STATES, Flows
from shallowdeep.report.missing import Missing
from shallowdeep.report.plots.figure import HATCHED, LOST, MAIN, ORACLE, QUIET, RIGHT, WRONG, Plot, axis, percents


def who_leaves_where(early: EarlyExits) -> Plot:
    """Who leaves where, right and wrong; the slider moves both."""
    names, found = [exit.name for exit in early.exits], early.start.decisions
    right = found.predictions == found.labels
    shares = [
        [((found.exits == exit.number) & mask).double().mean().item() for exit in early.exits]
        for mask in (right, ~right)
    ]
    data = [
        {"type": "bar", "name": name, "x": names, "y": percents(values), "marker": {"color": colour, **pattern},
         "hovertemplate": "%{x}: %{y:.1f} % leave here and are " + name + "<extra></extra>"}
        for name, values, colour, pattern in (
            ("right", shares[0], RIGHT, {}), ("wrong", shares[1], WRONG, HATCHED))
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "yaxis": axis("samples, %", rangemode="tozero"),
        "xaxis": {"type": "category"},
        "legend": {"traceorder": "normal"},
    }
    return Plot(data, layout, "Share of samples that leave at each exit, right and wrong.", 300)


def exit_by_exit(early: EarlyExits) -> Plot:
    """Accuracy of each exit, of the best so far, and who is first right where."""
    assert not isinstance(early.overthinking, Missing)
    names, found = [exit.name for exit in early.exits], early.overthinking
    bars = {
        "type": "bar", "name": "first right here", "x": names, "y": percents(found.first_correct),
        "marker": {"color": "--soft"}, "hovertemplate": "%{x}: %{y:.1f} % are first right here<extra></extra>",
    }  # fmt: skip
    lines = [
        {"type": "scatter", "mode": "lines+markers", "name": name, "x": names, "y": percents(values),
         "line": {"color": colour, "dash": dash, "width": 2.5}, "marker": {"symbol": symbol, "size": 8},
         "hovertemplate": "%{x}: %{y:.2f} %<extra>" + name + "</extra>"}
        for name, values, colour, dash, symbol in (
            ("right here or before", found.cumulative, ORACLE, "dash", "square"),
            ("right here", found.accuracy, MAIN, "solid", "circle"),
        )
    ]  # fmt: skip
    layout = {"yaxis": axis("samples, %", range=[0, 102]), "xaxis": {"type": "category"}}
    return Plot([bars, *lines], layout, "Accuracy of each exit and of the best exit so far; figures in the table.", 340)


def bands(early: EarlyExits, flows: Flows) -> Plot:
    """Three bands from exit to exit: right, lost, not yet right."""
    colours, labels = (RIGHT, LOST, QUIET), ("right", "lost: wrong, was right before", "not yet right")
    total, columns = sum(flows.counts[0]), len(flows.exits)
    number: dict[tuple[int, int], int] = {}
    nodes: dict[str, list[Any]] = {"x": [], "y": [], "color": [], "customdata": []}
    for column, counts in enumerate(flows.counts):
        above = 0.0
        for state, count in enumerate(counts):
            share = count / total
            if count:
                number[column, state] = len(number)
                nodes["x"].append(min(max(column / (columns - 1), 0.001), 0.999))
                nodes["y"].append(min(max(0.9 * (above + share / 2) + 0.05 * state, 0.001), 0.999))
                nodes["color"].append(colours[state])
                name = early.exits[flows.exits[column]].name
                nodes["customdata"].append(f"{name}: {100 * share:.1f} % {labels[state]}")
            above += share
    links: dict[str, list[Any]] = {"source": [], "target": [], "value": [], "color": [], "customdata": []}
    for column, move in enumerate(flows.moves):
        for before, after in ((b, a) for b in range(3) for a in range(3) if move[b][a]):
            links["source"].append(number[column, before])
            links["target"].append(number[column + 1, after])
            links["value"].append(move[before][after])
            links["color"].append(f"{colours[after]}-soft")
            links["customdata"].append(f"{STATES[before]} → {STATES[after]}")
    sankey = {
        "type": "sankey", "arrangement": "fixed", "meta": dict(zip(colours, labels, strict=True)),
        "node": {**nodes, "pad": 8, "thickness": 10, "label": [""] * len(number), "line": {"width": 0},
                 "hovertemplate": "%{customdata}<extra></extra>"},
        "link": {**links, "hovertemplate": "%{customdata}: %{value} samples<extra></extra>"},
    }  # fmt: skip
    heads = [
        {"x": column / (columns - 1), "y": 1.02, "xref": "paper", "yref": "paper", "showarrow": False,
         "yanchor": "bottom", "xanchor": "left" if column == 0 else "right" if column == columns - 1 else "center",
         "text": early.exits[exit].name.replace("exit ", "")}
        for column, exit in enumerate(flows.exits)
    ]  # fmt: skip
    layout = {"annotations": heads, "margin": {"l": 8, "r": 8, "t": 30, "b": 12}}
    return Plot([sankey], layout, "Flow of samples between right, lost and not yet right, exit by exit.", 360)
