"""The whole job on real handwritten digits, offline: three trainings, every analysis, three sentences, one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shallowdeep.analysis.budgets import Budgets, measure_budgets
from shallowdeep.analysis.overthinking import measure_overthinking
from shallowdeep.config import load_config
from shallowdeep.errors import require
from shallowdeep.report.html import write_report
from shallowdeep.runs.run import Run

DIGITS = {"data": "digits", "network": "resnet20", "recipe.batch_size": 64, "device": "cpu"}
EPOCHS = {"plain": 12, "ic_only": 8, "joint": 12}


def run_demo(folder: Path, *, say: Callable[[str], None] = print, resume: bool = False) -> dict[str, Run]:
    """Train ResNet-20 on digits plainly, convert it, train it jointly; record and analyse each.

    Args:
        folder: a run folder for each strategy is made in it, and ``report.html``.
        say: is told what is going on, a line at a time.
        resume: go on with the runs in that folder.

    Returns:
        Strategy to run.

    Raises:
        MissingExtra: a library that the demo needs is not installed; said before anything is trained.
    """
    for library in ("sklearn", "jinja2", "plotly", "PIL"):
        require(library, extra="demo")
    runs: dict[str, Run] = {}
    for strategy, epochs in EPOCHS.items():
        init = {"init": str(runs["plain"].folder)} if strategy == "ic_only" else {}
        config = load_config(changes={**DIGITS, **init, "strategy": strategy, "recipe.epochs": epochs})
        run = runs[strategy] = Run.create(folder / strategy, config, resume=resume)
        say(f"{strategy}: training for {epochs} epochs into {run.folder}")
        run.fit(resume=resume)
        run.record()
        run.analyze()
        if strategy != "plain":
            run.calibrate(max_cost=0.5)
            run.replay()
    for sentence in findings(runs):
        say(sentence)
    say(str(write_report([runs["ic_only"], runs["joint"], runs["plain"]], folder / "report.html")))
    return runs


def findings(runs: dict[str, Run]) -> list[str]:
    """What the three runs show, in three sentences."""
    tests = {strategy: run.trace("test") for strategy, run in runs.items()}
    plain = 100 * tests["plain"].correct[:, -1].double().mean().item()
    ic_only = measure_overthinking(tests["ic_only"])
    budgets = {s: measure_budgets(runs[s].trace("val"), tests[s], budgets=(0.5,)) for s in ("ic_only", "joint")}
    return [
        f"The plain network gets {plain:.1f} % of {ic_only.n} test digits right at the end, but "
        f"{100 * ic_only.wasteful:.1f} % were right at an exit before that: an oracle that leaves there in time would "
        f"spend {100 * ic_only.oracle_cost:.0f} % of the cost.",
        f"{100 * ic_only.destructive_of_errors:.0f} % of its errors are destructive overthinking: an earlier exit was "
        "right.",
        f"Leaving early at no more than half the cost, it keeps {_within(budgets['ic_only'])}; trained jointly with "
        f"its exits, {_within(budgets['joint'])} (thresholds from validation data).",
    ]


def _within(budgets: Budgets) -> str:
    row = budgets.table[0]
    if row.accuracy is None or row.cost is None:
        return "no threshold that cheap"
    return f"{100 * row.accuracy:.1f} % at {100 * row.cost:.0f} % of the cost"
