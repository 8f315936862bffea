"""Published figures beside ours, with the differences named."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from shallowdeep.studies.paper.layout import (
    Group,
    counts_text,
    label,
    markdown_table,
    mean_over,
    mean_text,
    paragraph,
    percent,
    signed,
    title_of_network,
)
from shallowdeep.studies.paper.published import CONFUSION, TABLE_3, WASTEFUL
from shallowdeep.studies.results import CellResult
from shallowdeep.studies.tasks import title_of

DIFFERENCES = """\
What differs, whatever the figures: the paper has one run, trained in float32 on all training images for 100 epochs
(exits alone: 25), and its thresholds are the best of eleven on the test images; ours come from validation images, a
tenth of the training images held out, or under the recipe `paper` from cross-fitted halves of the test images. Under
`fast`, training is shorter, has another schedule, is in bf16 where the machine computes in it, and exits alone learn
from four recorded passes over the augmented training images instead of fresh crops in every epoch. Networks under
IC-only training are frozen here in every number; in the authors' code their batch-norm statistics drift. MobileNet's
exits sit elsewhere, because the authors' profiler counts depthwise convolutions eight times too high. Tiny ImageNet's
colours are not changed at random here."""


def compare_with_published(groups: Sequence[Group]) -> list[str]:
    """Three small tables: the column Max, wasteful computation, confusion."""
    return [
        *paragraph(
            """Five rows of the paper's table could be had, and of them the column Max alone: the highest accuracy that
            any threshold reaches. Ours is first with a threshold from validation, then, after the slash, with the best
            one on test, which is how the published figure was chosen. An image that no exit is sure of gets the last
            exit's answer, and in the second row of ours the most confident exit's, which is the paper's rule. Gains
            over the plain network (CNN) of the same seed stand in brackets; *n* counts our runs."""
        ),
        "",
        *_max_table(groups),
        "",
        *paragraph(
            """Of wasteful computation one figure for each data set is known, "up to"; ours are the largest and the mean
            over networks and ways of training."""
        ),
        "",
        *_wasteful_table(groups),
        "",
        "Confusion was published for VGG-16 on Tiny ImageNet, as means over right and wrong answers.",
        "",
        *_confusion_table(groups),
        "",
        *paragraph(DIFFERENCES),
    ]


def _max_table(groups: Sequence[Group]) -> list[str]:
    rows = []
    for (data, network), row in TABLE_3.items():
        names = [title_of(data), title_of_network(network)]
        gains = [f"{percent(x, 1)} ({signed(100 * (x - row.plain))})" for x in (row.ic_only, row.joint)]
        rows.append([*names, "published", "1", percent(row.plain, 1), *gains])
        for group in groups:
            plain = _comparable(group.of(network, "plain"))
            both = [_comparable(group.of(network, strategy)) for strategy in ("ic_only", "joint")]
            if group.data == data and (plain or any(both)):
                counts = counts_text([len(runs) for runs in (plain, *both)])
                cnn = mean_over(plain, lambda run: run.accuracy)
                for whose, as_published in (("ours", False), ("ours, the paper's rule", True)):
                    texts = [_max_text(runs, plain, as_published=as_published) for runs in both]
                    rows.append([*names, f"{whose}, {group.recipe}", counts, cnn, *texts])
    return markdown_table(["data", "network", "whose", "n", "CNN", "IC-only Max", "joint Max"], rows)


def _max_text(runs: Sequence[CellResult], plain: Sequence[CellResult], *, as_published: bool) -> str:
    found = [(run.config.seed, run.within(None, as_published=as_published)) for run in runs]
    rows = [(seed, row) for seed, row in found if row is not None]
    fair = [(seed, row.accuracy) for seed, row in rows if row.accuracy is not None]
    best = [(seed, row.test_chosen_accuracy) for seed, row in rows if row.test_chosen_accuracy is not None]
    return " / ".join(_with_gain(found, plain) for found in (fair, best)) if fair else "–"


def _with_gain(found: Sequence[tuple[int, float]], plain: Sequence[CellResult]) -> str:
    """A mean accuracy, and in brackets what it is above the plain networks of the same seeds."""
    by_seed = {run.config.seed: run.accuracy for run in plain}
    gains = [accuracy - by_seed[seed] for seed, accuracy in found if seed in by_seed]
    gain = f" ({signed(100 * statistics.fmean(gains))})" if gains else ""
    return f"{mean_text([accuracy for _, accuracy in found])}{gain}"


def _wasteful_table(groups: Sequence[Group]) -> list[str]:
    rows = []
    for data, published in WASTEFUL.items():
        runs = _comparable([r for group in groups if group.data == data for r in group.results if len(r.costs) > 1])
        shares = [run.overthinking.wasteful for run in runs]
        ours = [percent(max(shares), 1), percent(statistics.fmean(shares), 1), str(len(runs))] if runs else ["–"] * 3
        rows.append([title_of(data), percent(published, 0), *ours])
    return markdown_table(["data", "published, up to", "ours, largest", "ours, mean", "runs"], rows)


def _confusion_table(groups: Sequence[Group]) -> list[str]:
    rows = []
    for (data, network), row in CONFUSION.items():
        signs = [signed(row.confusion_correct), signed(row.confusion_wrong)]
        shares = [f"{row.confidence_correct:.2f}", f"{row.confidence_wrong:.2f}"]
        rows.append([title_of(data), title_of_network(network), "published", "", *signs, *shares])
        for group in groups:
            for strategy in ("ic_only", "joint", "mixed"):
                runs = _comparable(group.of(network, strategy)) if group.data == data else []
                found = [run.confusion for run in runs if run.confusion is not None and not run.label_smoothing]
                if found:
                    names = ("mean_correct", "mean_wrong", "confidence_correct", "confidence_wrong")
                    means = [statistics.fmean(getattr(c, name) for c in found) for name in names]
                    signs = [signed(x) for x in means[:2]] + [f"{x:.2f}" for x in means[2:]]
                    rows.append(
                        [title_of(data), title_of_network(network), f"ours, {group.recipe}", label(strategy), *signs]
                    )
        if len(rows) == 1:
            rows.append([title_of(data), title_of_network(network), "ours", "", *["–"] * 4])
    heads = ["confusion, right", "confusion, wrong", "confidence, right", "confidence, wrong"]
    return markdown_table(["data", "network", "whose", "training", *heads], rows)


def _comparable(runs: Sequence[CellResult]) -> list[CellResult]:
    return [run for run in runs if not run.flaws]
