"""The page's diagrams as files for papers: SVG and PDF."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.report.content import Page, make_page
from shallowdeep.report.plots.figure import Plot
from shallowdeep.report.plots.images import draw_galleries
from shallowdeep.report.plots.page import make_plots
from shallowdeep.report.plots.paper import draw_plot, styled
from shallowdeep.runs.run import Run
from shallowdeep.storage import replacing

FORMATS = ("svg", "pdf")


@dataclass(frozen=True)
class Figures:
    """Figures that were written.

    Attributes:
        folder: where they lie.
        names: of the figures, each a file in every format.
        formats: of the files.
        left_out: what could not be drawn, and why, one line each.
    """

    folder: Path
    names: tuple[str, ...]
    formats: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        found = f"{self.folder}: {', '.join(self.names)}; each as {' and '.join(self.formats)}."
        return "\n".join([found, *self.left_out])


def write_figures(
    runs: Sequence[Run],
    folder: str | os.PathLike[str],
    *,
    formats: Sequence[str] = FORMATS,
    galleries: bool = True,
) -> Figures:
    """Write the diagrams of a report, and its galleries, as figures for papers.

    They show what the page of the same runs shows with its slider untouched, one column (3.4 inches) wide, letters as
    letters. Named ``{run}-{diagram}.{format}``; of several runs also ``compare``. The same runs give the same files.

    Args:
        runs: recorded ones.
        folder: made where it is not there; files of the same names are replaced.
        formats: among ``"svg"`` and ``"pdf"``.
        galleries: also images of the test split, where the run's data are images and at hand.

    Raises:
        ConfigError: there is no run, or one is given twice, or no format.
        UnknownName: there is no such format.
        FileFormatError: a run has no recorded test split, or it is damaged.
        TraceError: a Trace's exits have several label sets, or differ in width.
        MissingExtra: matplotlib is not installed.
    """
    if not formats:
        raise ConfigError("figures need a format. Name one: svg or pdf.")
    for name in formats:
        if name not in FORMATS:
            raise UnknownName("figure format", name, FORMATS)
    place = Path(folder)
    with styled():
        page = make_page(runs, galleries=galleries)
        drawn = _draw(page)
        if not drawn:
            raise ConfigError(f"there is nothing to draw: {', '.join(c.name for c in page.chapters)} has one exit.")
        for name, figure in drawn.items():
            for format in formats:
                _save(figure, place / f"{name}.{format}")
    return Figures(place, tuple(drawn), tuple(formats), page.left_out)


def _draw(page: Page) -> dict[str, Any]:
    """Figures by name: of every run its diagrams and its images."""
    names = {chapter.key: chapter.name.replace("/", "-") for chapter in page.chapters}
    found = {_named(key, names): draw_plot(_still(key, plot)) for key, plot in make_plots(page).items()}
    for chapter in page.chapters:
        found |= {f"{names[chapter.key]}-{name}": figure for name, figure in draw_galleries(chapter).items()}
    return found


def _still(key: str, plot: Plot) -> Plot:
    """A diagram without what only a slider makes sense of: the last points of a curve of accuracy against cost."""
    return replace(plot, data=plot.data[:-1]) if key.endswith("-curve") else plot


def _named(key: str, names: Mapping[str, str]) -> str:
    """A diagram's name with its run's own name before it."""
    run, _, diagram = key.partition("-")
    return f"{names[run]}-{diagram}" if diagram else key


def _save(figure: Any, path: Path) -> None:
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], metadata=undated[path.suffix[1:]])
