"""What the page says: frozen values, from runs' Traces and the analyses of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shallowdeep.errors import ConfigError
from shallowdeep.report.early import EarlyExits, look_at_exits
from shallowdeep.report.missing import Missing
from shallowdeep.report.origins import Origins, find_origins
from shallowdeep.runs.run import Run


@dataclass(frozen=True)
class Chapter:
    """All that the page says of one run.

    Attributes:
        key: for names inside the page.
        name: of the run folder; with its parent's where two are called alike.
        network: its name.
        data: of the samples.
        strategy: how it was trained.
        n: samples.
        measure: ``"accuracy"``, or ``"agreement"`` with the last exit where there are no labels.
        accuracy: of the last exit.
        early: ``None``: the network has one exit, its own.
        origins: where the figures come from.
    """

    key: str
    name: str
    network: str
    data: str
    strategy: str
    n: int
    measure: str
    accuracy: float
    early: EarlyExits | None
    origins: Origins

    @property
    def standard_error(self) -> float:
        """Of the last exit's accuracy; of any other that is near to it, too."""
        return (self.accuracy * (1 - self.accuracy) / self.n) ** 0.5


@dataclass(frozen=True)
class Page:
    """The whole page.

    Attributes:
        chapters: one per run, in the order given.
        first: which is shown first: the first run with internal exits.
    """

    chapters: tuple[Chapter, ...]
    first: int

    @property
    def left_out(self) -> tuple[str, ...]:
        """What could not be shown, and why, one line for each reason."""
        lines = []
        for chapter in self.chapters:
            parts = {} if chapter.early is None else vars(chapter.early)
            missing = {name: value.reason for name, value in parts.items() if isinstance(value, Missing)}
            for reason in dict.fromkeys(missing.values()):
                names = ", ".join(name for name, why in missing.items() if why == reason)
                lines.append(f"{chapter.name}: no {names}: {reason}")
        return tuple(lines)


def make_page(runs: Sequence[Run], *, galleries: bool = True) -> Page:
    """Everything that the page says.

    Args:
        runs: recorded ones, at least one.
        galleries: show images; their data must be at hand.

    Raises:
        ConfigError: there is no run, or one is given twice.
        FileFormatError: a run has no recorded test split, or it is damaged.
        TraceError: a Trace's exits have several label sets, or differ in width.
    """
    if not runs:
        raise ConfigError("a report needs at least one run folder. Give one, e.g. runs/demo/ic_only.")
    names = _names([run.folder for run in runs])
    chapters = tuple(
        _chapter(run, name, f"run{number}", galleries=galleries)
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
    )
    with_exits = [number for number, chapter in enumerate(chapters) if chapter.early is not None]
    return Page(chapters, with_exits[0] if with_exits else 0)


def _names(folders: Sequence[Path]) -> list[str]:
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ConfigError(f"a run is given twice: {', '.join(map(str, folders))}. Name each once.")
    names = [place.name for place in places]
    return [
        f"{place.parent.name}/{name}" if names.count(name) > 1 else name
        for place, name in zip(places, names, strict=True)
    ]


def _chapter(run: Run, name: str, key: str, *, galleries: bool) -> Chapter:
    test = run.trace("test")
    labelled = test.labels is not None
    judged = test if labelled else test.as_agreement()
    return Chapter(
        key=key,
        name=name,
        network=run.config.network,
        data=run.config.data,
        strategy=run.config.strategy,
        n=len(test),
        measure="accuracy" if labelled else "agreement",
        accuracy=judged.correct[:, -1].double().mean().item(),
        early=None if test.num_exits == 1 else look_at_exits(run, judged, labelled=labelled, galleries=galleries),
        origins=find_origins(run),
    )
