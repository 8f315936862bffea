"""The page's galleries for papers: simple and complex images, and what overthinking destroyed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from shallowdeep.errors import require
from shallowdeep.report.content import Chapter
from shallowdeep.report.early import Views
from shallowdeep.report.gallery import Gallery, Picture
from shallowdeep.report.missing import Missing
from shallowdeep.report.plots.paper import FONT, WIDTH, new_figure

COLUMNS = 6
SMALL = FONT - 2


def draw_galleries(chapter: Chapter) -> dict[str, Any]:
    """A run's galleries as matplotlib figures by name; none where it has none.

    Args:
        chapter: what the page says of the run.

    Raises:
        MissingExtra: matplotlib or pillow is not installed.
    """
    if chapter.early is None or isinstance(chapter.early.galleries, Missing):
        return {}
    simple, lost = chapter.early.galleries
    views = {} if isinstance(chapter.early.saliency, Missing) else chapter.early.saliency
    shown = [gallery for gallery in simple if gallery.pictures]
    pictures = [picture for gallery in lost for picture in gallery.pictures][:COLUMNS]
    figures = {"images": _by_exit(shown)} if shown else {}
    return figures | ({"destroyed": _destroyed(pictures, views)} if pictures else {})


def _by_exit(galleries: Sequence[Gallery]) -> Any:
    """A row for each exit: images that it is the first to get right."""
    grid = _grid(len(galleries))
    for row, gallery in zip(grid, galleries, strict=True):
        _say(row[0], gallery.title.removeprefix("first right at ").replace("the ", ""))
        for axes, picture in zip(row, gallery.pictures, strict=False):
            axes.imshow(_pixels(picture.url))
            axes.set_title(picture.label, fontsize=SMALL, pad=1.5)
    return grid[0][0].figure


def _destroyed(pictures: Sequence[Picture], views: Views) -> Any:
    """A column for each image: itself, where the first exit looked, where the last one did."""
    grid = _grid(3 if views else 1)
    for row, title in zip(grid, ("image", "exit 0", "last"), strict=False):
        _say(row[0], title)
    for column, picture in enumerate(pictures):
        grid[0][column].imshow(_pixels(picture.url))
        grid[0][column].set_title(picture.label, fontsize=SMALL, pad=1.5)
        for row, view in zip(grid[1:], views.get(picture.row, ()), strict=False):
            row[column].imshow(_pixels(view.url))
            row[column].set_title(view.answer, fontsize=SMALL, pad=1.5)
    return grid[0][0].figure


def _grid(rows: int) -> Any:
    figure = new_figure(WIDTH, rows * WIDTH / COLUMNS)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return grid


def _say(axes: Any, text: str) -> None:
    """Words to the left of a row."""
    axes.text(-0.15, 0.5, text, transform=axes.transAxes, ha="right", va="center", rotation=90, fontsize=SMALL)


def _pixels(url: str) -> Any:
    content = base64.b64decode(url.partition(",")[2])
    return require("PIL.Image", extra="data").open(io.BytesIO(content)).convert("RGB")
