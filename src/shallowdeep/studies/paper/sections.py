"""The page's sections behind the table: thresholds, exits, overthinking, confusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from shallowdeep.analysis.confusion import Confusion
from shallowdeep.studies.paper.layout import (
    COLUMNS,
    Group,
    label,
    markdown_table,
    mean_of_met,
    mean_over,
    paragraph,
    percent,
    signed,
    title_of_network,
)
from shallowdeep.studies.paper.matrix import NETWORKS
from shallowdeep.studies.results import CellResult
from shallowdeep.studies.tasks import title_of

SCORES = ("confusion", "max-softmax", "entropy")
_HEADS = ("data", "recipe", "network", "training")
NOTHING = ["No network with exits has been run yet."]


def compare_thresholds(groups: Sequence[Group]) -> list[str]:
    """Accuracy within budgets: thresholds that other images chose, and those that are best on test."""
    rows, flattery = [], []
    for group, network, strategy, runs in _runs_with_exits(groups):
        cells = []
        for budget, _ in COLUMNS:
            found = [row for run in runs if (row := run.within(budget)) is not None]
            fair, best = [row.accuracy for row in found], [row.test_chosen_accuracy for row in found]
            flattery += [b - a for a, b in zip(fair, best, strict=True) if a is not None and b is not None]
            cells.append(f"{mean_of_met(fair)} / {mean_of_met(best)}")
        rows.append([*_names(group, network, strategy), *cells])
    if not rows:
        return NOTHING
    mean, most = fmean(flattery), max(flattery)
    return [
        *paragraph(
            f"""The authors' code chooses thresholds on the test images. Left of the slash is the accuracy of the
            threshold that other images chose, right of it that of the best threshold on test itself, within the same
            budget. Choosing on test would have added {percent(mean)} points on average, {percent(most)} at most. The
            left figure can be the higher one where its threshold overruns the budget a little on test."""
        ),
        "",
        *markdown_table([*_HEADS, *(title for _, title in COLUMNS)], rows),
    ]


def compare_answers(groups: Sequence[Group]) -> list[str]:
    """Accuracy within budgets: unsure images answered by the last exit, and by the most confident one."""
    rows = [
        [
            *_names(group, network, strategy),
            *(
                " / ".join(mean_of_met(_accuracies(runs, budget, as_published=theirs)) for theirs in (False, True))
                for budget, _ in COLUMNS
            ),
        ]
        for group, network, strategy, runs in _runs_with_exits(groups)
        if all(run.budgets_as_published is not None for run in runs)
    ]
    if not rows:
        return NOTHING
    return [
        *paragraph(
            """An image that no exit is sure of has cost all of the network, and any exit's answer can be had. Left of
            the slash it gets the last exit's, as everywhere else on this page, right of it that of the most confident
            exit, which is the paper's rule. Thresholds are chosen on other images, for each rule by itself."""
        ),
        "",
        *markdown_table([*_HEADS, *(title for _, title in COLUMNS)], rows),
    ]


def _accuracies(runs: Sequence[CellResult], budget: float | None, *, as_published: bool) -> list[float | None]:
    found = [run.within(budget, as_published=as_published) for run in runs]
    return [row.accuracy for row in found if row is not None]


def show_exits(groups: Sequence[Group]) -> list[str]:
    """Cost, accuracy and cumulative accuracy of every exit."""
    found = _runs_with_exits(groups)
    if not found:
        return NOTHING
    internal = max(len(runs[0].costs) for *_, runs in found) - 1
    rows, before = [], None
    for group, network, strategy, runs in found:
        first, blank = runs[0], [""] * (internal + 1 - len(runs[0].costs))
        if (group, network) != before:
            costs = [percent(cost, 1) for cost in first.costs]
            rows.append([*_names(group, network, "*cost*"), *costs[:-1], *blank, costs[-1]])
            before = group, network
        columns = [
            f"{mean_over(runs, lambda run, i=i: run.overthinking.accuracy[i])} / "
            f"{mean_over(runs, lambda run, i=i: run.overthinking.cumulative[i])}"
            for i in range(len(first.costs))
        ]
        rows.append([*_names(group, network, strategy), *columns[:-1], *blank, columns[-1]])
    return [
        *paragraph(
            """Accuracy of each exit, and after the slash the share of images that it or an earlier exit gets right.
            Where the second figure of the last column is the larger one, some exit knew what the end did not."""
        ),
        "",
        *markdown_table([*_HEADS, *(f"exit {i}" for i in range(internal)), "last"], rows),
    ]


def show_overthinking(groups: Sequence[Group]) -> list[str]:
    """Wasteful and destructive overthinking of every network with exits."""
    measures: list[tuple[str, Callable[[CellResult], float]]] = [
        ("wasteful", lambda run: run.overthinking.wasteful),
        ("of these right at the end", lambda run: run.overthinking.wasteful_and_right),
        ("destructive", lambda run: run.overthinking.destructive),
        ("of all errors", lambda run: run.overthinking.destructive_of_errors),
        ("cost of an oracle", lambda run: run.overthinking.oracle_cost),
    ]
    rows = [
        [*_names(group, network, strategy), *(mean_over(runs, measure) for _, measure in measures)]
        for group, network, strategy, runs in _runs_with_exits(groups)
    ]
    if not rows:
        return NOTHING
    return [
        *paragraph(
            """*Wasteful*: an exit before the last gets the image right, so that all computation after it is wasted.
            *Destructive*: an earlier exit has it right and the last one wrong. The oracle leaves at the first right
            exit, and goes to the end where there is none."""
        ),
        "",
        *markdown_table([*_HEADS, *(title for title, _ in measures)], rows),
    ]


def show_confusion(groups: Sequence[Group]) -> list[str]:
    """How well confusion and the last exit's own scores find its wrong answers."""
    rows, smoothed = [], []
    for group, network, strategy, runs in _runs_with_exits(groups):
        smoothed += [run.name for run in runs if run.label_smoothing]
        found = [run.confusion for run in runs if run.confusion is not None and not run.label_smoothing]
        if found:
            rows.append([*_names(group, network, strategy), *_means(found)])
    if not rows and not smoothed:
        return NOTHING
    heads = ("confusion, right / wrong", "confidence, right / wrong", "errors missed, %", "AUROC", "AURC")
    lines = [
        *paragraph(
            """Confusion is how much the exits disagree with the last one, normalised on training images. The means are
            over right and wrong answers; *errors missed* is the share of wrong answers that look better than the mean
            right one, by confusion and by confidence. AUROC (higher is better) and the area under the risk-coverage
            curve (AURC, lower is better) are of confusion, max-softmax and entropy, in this order, for finding wrong
            answers."""
        ),
        "",
        *markdown_table([*_HEADS, *heads], rows),
    ]
    if smoothed:
        lines += ["", *paragraph(f"Trained with label smoothing and left out: {', '.join(smoothed)}.")]
    return lines


def _means(found: Sequence[Confusion]) -> list[str]:
    """A row's cells: what is compared stands on the two sides of a slash."""

    def mean(name: str) -> float:
        return fmean(getattr(confusion, name) for confusion in found)

    missed = (mean("wrong_below_correct_mean"), mean("wrong_above_correct_mean_confidence"))
    return [
        f"{signed(mean('mean_correct'))} / {signed(mean('mean_wrong'))}",
        f"{mean('confidence_correct'):.2f} / {mean('confidence_wrong'):.2f}",
        " / ".join(percent(share, 1) for share in missed),
        " / ".join(f"{fmean(confusion.auroc[score] for confusion in found):.3f}" for score in SCORES),
        " / ".join(f"{fmean(confusion.aurc[score] for confusion in found):.4f}" for score in SCORES),
    ]


def _names(group: Group, network: str, strategy: str) -> list[str]:
    return [title_of(group.data), group.recipe, title_of_network(network), label(strategy)]


def _runs_with_exits(groups: Sequence[Group]) -> list[tuple[Group, str, str, list[CellResult]]]:
    return [
        (group, network, strategy, runs)
        for group in groups
        for network in group.networks(NETWORKS)
        for strategy in ("ic_only", "joint", "mixed")
        if (runs := group.of(network, strategy))
    ]
