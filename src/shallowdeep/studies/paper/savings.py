"""What early exits save while a network stays as accurate as the plain one."""

from __future__ import annotations

from collections.abc import Sequence

from shallowdeep.studies.paper.evidence import HALF_A_POINT, Figures, reaches
from shallowdeep.studies.paper.layout import (
    Group,
    label,
    markdown_table,
    paragraph,
    percent,
    signed,
    title_of_network,
)
from shallowdeep.studies.paper.matrix import DATA
from shallowdeep.studies.results import CellResult
from shallowdeep.studies.tasks import title_of

Pairs = Sequence[tuple[CellResult, CellResult]]


def pairs(results: Sequence[CellResult], strategies: Sequence[str]) -> list[tuple[CellResult, CellResult]]:
    """Each run of some strategies with its plain network, where that was run."""
    plain = {result.pair: result for result in results if result.strategy == "plain"}
    return [(run, plain[run.pair]) for run in results if run.strategy in strategies and run.pair in plain]


def without_smoothing(results: Sequence[CellResult]) -> list[CellResult]:
    """Those without label smoothing, which changes every confidence and so what a threshold on it is worth."""
    return [result for result in results if not result.label_smoothing]


def saved(found: Pairs, given_up: float) -> tuple[Figures, Figures]:
    """What runs save, and by how much their accuracy then differs from their plain network's."""
    rows = [(run, plain, *saved_at_plain_accuracy(run, plain, given_up)) for run, plain in found]
    return (
        [(run, saving) for run, _, saving, _ in rows],
        [(run, accuracy - plain.accuracy) for run, plain, _, accuracy in rows],
    )


def saved_at_plain_accuracy(run: CellResult, plain: CellResult, given_up: float = 0.0) -> tuple[float, float]:
    """What a run saves while it is as accurate as the plain network, and its accuracy there; both on test.

    The threshold is that of the lowest budget, in steps of 2.5 %, whose validation accuracy is the plain network's or
    better, less what is given up. Where none is, samples go through to the last exit, and nothing is saved.

    Without validation images (recipe ``paper``) the *budget* is chosen on the test images themselves: the lowest whose
    thresholds, each on the half of them that chose it, are as accurate as the plain network on all of them. What is
    then saved, and the accuracy, are still those of each threshold on the other half.
    """
    floor = (plain.val_accuracy[-1] if plain.val_accuracy and run.val_accuracy else plain.accuracy) - given_up
    for row in () if run.curve is None else run.curve.table:
        if row.val_accuracy is not None and reaches(row.val_accuracy, floor):
            assert row.cost is not None
            assert row.accuracy is not None
            return 1 - row.cost, row.accuracy
    return 1 - run.costs[-1], run.accuracy


def show_savings(groups: Sequence[Group]) -> list[str]:
    """Run by run, what is saved at the plain network's accuracy and at half a point less."""
    rows = [
        [
            title_of(group.data),
            group.recipe,
            title_of_network(run.config.network),
            label(run.strategy),
            str(run.config.seed),
            percent(plain.accuracy),
            *(_saving(run, plain, given_up) for given_up in (0.0, HALF_A_POINT)),
        ]
        for group in groups
        for run, plain in pairs(without_smoothing(group.results), ("ic_only", "joint", "mixed"))
        if run.curve is not None and group.data in DATA
    ]
    if not rows:
        return ["No network with exits has been run yet beside its plain one."]
    return [
        *paragraph(
            """The threshold is that of the lowest cost, in steps of 2.5 %, that is as accurate as the plain network on
            the images that choose it, or half a point less so. Saved is a share of the plain network's cost on the test
            images, and in brackets stands by how many points the accuracy there differs from the plain one. *None*: no
            threshold is that accurate."""
        ),
        "",
        *markdown_table(
            ["data", "recipe", "network", "training", "seed", "CNN", "saved, %", "with half a point less"], rows
        ),
    ]


def _saving(run: CellResult, plain: CellResult, given_up: float) -> str:
    saving, accuracy = saved_at_plain_accuracy(run, plain, given_up)
    change = f"({signed(100 * (accuracy - plain.accuracy))})"
    return f"none {change}" if saving <= 0 else f"{percent(saving, 1)} {change}"
