"""The page's HTML and style, and what its script computes with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from shallowdeep.explore.setting import Setting, Usual
from shallowdeep.policies.rules import exits_of
from shallowdeep.report.html import TEMPLATES as REPORT
from shallowdeep.report.html import templates_in
from shallowdeep.report.missing import Missing

TEMPLATES = Path(__file__).parent / "templates"


def render(setting: Setting, *, too_large: str, max_upload_mb: float) -> str:
    """The page.

    Args:
        setting: what it is about.
        too_large: what is said of a file beyond the limit.
        max_upload_mb: that limit.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    shelf = setting.shelf
    groups = [] if isinstance(shelf, Missing) else [group for group in shelf.groups if group.ids]
    return (
        templates_in(TEMPLATES, extra="explore")
        .get_template("page.html.j2")
        .render(
            setting=setting,
            name=setting.run.folder.resolve().name,
            config=setting.run.config,
            threshold=float(setting.slider.threshold),
            groups=groups,
            max_upload_mb=f"{max_upload_mb:g}",
            data={**_data(setting), "most_bytes": int(1e6 * max_upload_mb), "too_large": too_large},
        )
    )


def style() -> str:
    """The report's style, and what this page has beside it."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (REPORT / "page.css", TEMPLATES / "explore.css"))


def _data(setting: Setting) -> dict[str, Any]:
    """What the browser computes with."""
    used = exits_of(setting.slider, setting.sdn.num_exits)
    usual = setting.usual
    histogram = None
    if isinstance(usual, Usual) and not isinstance(usual.suspicion, Missing):
        histogram = asdict(usual.suspicion.histogram)
    return {
        "classes": setting.class_names,
        "exits": [asdict(exit) for exit in setting.exits],
        "used": used,
        "costs": setting.sdn.costs.relative(used[:-1])[used].tolist(),
        "threshold": float(setting.slider.threshold),
        "answer": setting.slider.answer,
        "policy": None if setting.policy is None else setting.policy.kind,
        "histogram": histogram,
    }
