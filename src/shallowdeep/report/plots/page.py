"""All diagrams of a page, by name."""

from __future__ import annotations

from collections.abc import Sequence

from shallowdeep.report.content import Chapter, Page
from shallowdeep.report.early import EarlyExits
from shallowdeep.report.missing import Missing
from shallowdeep.report.plots.curves import accuracy_against_cost, side_by_side
from shallowdeep.report.plots.exits import bands, exit_by_exit, who_leaves_where
from shallowdeep.report.plots.figure import Plot
from shallowdeep.report.plots.suspicion import confusion_histogram, risk_against_coverage, roc_curves


def make_plots(page: Page) -> dict[str, Plot]:
    """Every diagram of a page, by its name in it."""
    found: dict[str, Plot] = {}
    plain = [chapter for chapter in page.chapters if chapter.early is None]
    for chapter in page.chapters:
        if chapter.early is not None:
            plots = _of_chapter(chapter, chapter.early, plain)
            found |= {f"{chapter.key}-{name}": plot for name, plot in plots.items()}
    if len(page.chapters) > 1:
        found["compare"] = side_by_side(page.chapters)
    return found


def _of_chapter(chapter: Chapter, early: EarlyExits, plain: Sequence[Chapter]) -> dict[str, Plot]:
    beside = [one for one in plain if (one.network, one.data, one.n) == (chapter.network, chapter.data, chapter.n)]
    plots = {"curve": accuracy_against_cost(chapter, early, beside), "leaving": who_leaves_where(early)}
    if not isinstance(early.overthinking, Missing):
        plots["exits"] = exit_by_exit(early)
    if not isinstance(early.bands, Missing):
        plots["flows"] = bands(early, early.bands)
    if not isinstance(early.confusion, Missing):
        plots["histogram"] = confusion_histogram(early.confusion)
        plots["roc"] = roc_curves(early.confusion.roc)
        plots["risk"] = risk_against_coverage(early.confusion)
    return plots
