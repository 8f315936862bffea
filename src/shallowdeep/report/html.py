"""The page as one file: template, style, script, data and the plotting library, all inside."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallowdeep.errors import ConfigError, require
from shallowdeep.report.content import Page, make_page
from shallowdeep.report.gallery import MAX_CLASSES
from shallowdeep.report.missing import Missing
from shallowdeep.report.plots.page import make_plots
from shallowdeep.report.words import count, percent, points, signed, verdict
from shallowdeep.runs.run import Run
from shallowdeep.storage import write_text

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        path: of the file.
        size: in bytes.
        left_out: what it could not show, and why, one line each; the page says the same where it would stand.
    """

    path: Path
    size: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.size / 1e6:.1f} MB) opens in any browser.", *self.left_out]
        return "\n".join(lines)


def write_report(runs: Sequence[Run], out: str | os.PathLike[str], *, galleries: bool = True) -> Report:
    """Write one self-contained, interactive HTML page about runs.

    Everything is in the file: it needs no server and asks for nothing.

    Args:
        runs: recorded ones; the first with internal exits is shown first.
        out: file to write, whole or not at all; replaced when it exists.
        galleries: show images of the test split, where the run's data are images and at hand.

    Returns:
        What was written, and what had to be left out.

    Raises:
        ConfigError: there is no run, one is given twice, or ``out`` is a folder.
        FileFormatError: a run has no recorded test split, or it is damaged.
        TraceError: a Trace's exits have several label sets, or differ in width.
        MissingExtra: jinja2 or plotly is not installed.
    """
    path = Path(out)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Name the file to write, e.g. {path / 'report.html'}.")
    template = templates_in(TEMPLATES).get_template("page.html.j2")
    library = require("plotly.offline", extra="report").get_plotlyjs()
    page = make_page(runs, galleries=galleries)
    text = render(page, template, library, command=_command(runs, path))
    write_text(path, text)
    return Report(path, path.stat().st_size, page.left_out)


def render(page: Page, template: Any, library: str, *, command: str) -> str:
    """The page's HTML.

    Args:
        page: what it says.
        template: the one of this folder.
        library: the plotting library's script.
        command: that makes the page again.
    """
    markup = require("markupsafe", extra="report").Markup
    plots = make_plots(page)
    return template.render(
        page=page,
        plots=plots,
        data=_data(page) | {"plots": {name: plot.to_dict() for name, plot in plots.items()}},
        library=markup(library),
        style=markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        command=command,
        max_classes=MAX_CLASSES,
    )


def _data(page: Page) -> dict[str, Any]:
    """What the browser computes with."""
    return {
        "first": page.chapters[page.first].key,
        "runs": {
            chapter.key: chapter.early.samples.to_dict() | {"threshold": chapter.early.start.threshold}
            for chapter in page.chapters
            if chapter.early is not None
        },
    }


def templates_in(folder: Path, *, extra: str = "report") -> Any:
    """A jinja2 environment over a folder of templates: what is put in is text, never markup.

    Args:
        folder: of the templates.
        extra: of this package, that brings jinja2.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra=extra)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"percent": percent, "count": count, "signed": signed, "points": points, "verdict": verdict}
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    return environment


def _command(runs: Sequence[Run], out: Path) -> str:
    return shlex.join(["shallowdeep", "report", *(str(run.folder) for run in runs), "--out", str(out)])
