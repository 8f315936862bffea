"""What this project set out to beat, and whether it does: accuracies on CIFAR-100, and the paper's gains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from shallowdeep.studies.estimates import flops_of_training
from shallowdeep.studies.paper.evidence import reaches
from shallowdeep.studies.paper.layout import (
    Group,
    label,
    markdown_table,
    mean_of_met,
    mean_text,
    paragraph,
    signed,
    title_of_network,
)
from shallowdeep.studies.paper.matrix import DATA, NETWORKS
from shallowdeep.studies.paper.published import COMPUTE, TABLE_3, published_gain
from shallowdeep.studies.results import CellResult
from shallowdeep.studies.tasks import title_of

STRATEGIES = ("ic_only", "joint", "mixed")
SAME_COMPUTE = 0.01
"""Training compute, as a multiple of the plain network's, that counts as no more than another."""


@dataclass(frozen=True)
class Target:
    """An accuracy within one of the paper's budgets."""

    accuracy: float
    budget: float


TARGETS = {
    ("cifar100", "vgg16"): Target(0.75, 0.5),
    ("cifar100", "resnet56"): Target(0.71, 0.75),
    ("cifar100", "wrn32_4"): Target(0.78, 0.75),
    ("cifar100", "mobilenet"): Target(0.70, 0.75),
}
"""By data and network."""


def show_targets(groups: Sequence[Group]) -> list[str]:
    """Two tables: accuracies to reach, and gains to pass."""
    return [
        *paragraph(
            """These figures are this project's own aims, above what was published. An accuracy counts within a budget,
            by a threshold that other images chose; *cost* is what came out on the test images. Every way of training
            that was tried has its row, with the mean over *n* runs. Runs that are not comparable with published ones,
            or trained with label smoothing, are left out."""
        ),
        "",
        *_accuracies(groups),
        "",
        *paragraph(
            """And everywhere more accuracy over the plain network of the same seed and recipe, in points at Max, than
            the paper gave for IC-only and joint training. Mixed training is not the paper's: it is held against joint
            training there. *Compute* is that of training, in PFLOPs (3 × forward × images × epochs; for exits on a
            frozen network, forward × images × epochs or recorded passes; the exits' own few per cent left out), with
            the plain network's training in it where a cell starts from that, and as a multiple of it, ours and
            published. A gain that took a larger multiple is called so."""
        ),
        "",
        *_gains(groups),
    ]


def _accuracies(groups: Sequence[Group]) -> list[str]:
    rows = []
    for (data, network), target in TARGETS.items():
        names = [
            title_of(data),
            title_of_network(network),
            f"≥ {100 * target.accuracy:.0f} at ≤ {100 * target.budget:.0f} %",
        ]
        found = [
            [*names, *_reached(group, strategy, runs, target)]
            for group, strategy, runs in _tried(groups, data, network)
            if all(run.within(target.budget) is not None for run in runs)
        ]
        rows += found or [[*names, *["–"] * 5, "not tested yet"]]
    return markdown_table(
        ["data", "network", "to beat", "training", "recipe", "accuracy", "cost", "n", "verdict"], rows
    )


def _reached(group: Group, strategy: str, runs: Sequence[CellResult], target: Target) -> list[str]:
    found = [row for run in runs if (row := run.within(target.budget)) is not None]
    accuracies = [row.accuracy for row in found if row.accuracy is not None]
    costs = [row.cost for row in found if row.cost is not None]
    met = len(accuracies) == len(runs) and reaches(statistics.fmean(accuracies), target.accuracy)
    texts = [mean_of_met([row.accuracy for row in found]), mean_text(costs)]
    return [label(strategy), group.recipe, *texts, str(len(runs)), "beaten" if met else "not beaten"]


def _gains(groups: Sequence[Group]) -> list[str]:
    rows = []
    for data in DATA:
        for network in NETWORKS:
            names, missing = [title_of(data), title_of_network(network)], [*STRATEGIES]
            for group, strategy, runs in _tried(groups, data, network):
                pairs = _with_plain(runs, group.of(network, "plain"))
                if pairs:
                    rows.append([*names, *_passed(group, strategy, pairs)])
                    missing = [name for name in missing if name != strategy]
            if missing and (data, network) in TABLE_3:
                published = " / ".join(_gain_text(published_gain(data, network, name)) for name in missing)
                untried = ", ".join(map(label, missing))
                rows.append([*names, untried, "–", "–", published, "–", "–", "–", "not tested yet"])
    heads = ["data", "network", "training", "recipe", "gain", "published", "compute", "× plain", "n", "verdict"]
    return markdown_table(heads, rows)


def _passed(group: Group, strategy: str, pairs: Sequence[tuple[CellResult, CellResult]]) -> list[str]:
    run, plain = pairs[0]
    gains = [
        row.accuracy - plain.accuracy for run, plain in pairs if (row := run.within(None)) and row.accuracy is not None
    ]
    published = published_gain(run.config.data, run.config.network, strategy)
    compute, base = training_compute(run, plain), training_compute(plain, plain)
    word = "nothing published"
    if published is not None:
        dear = compute / base > COMPUTE[strategy] + SAME_COMPUTE
        word = "not beaten" if reaches(published, statistics.fmean(gains)) else "beaten"
        word += ", with more compute" if dear and word == "beaten" else ""
    spread = f" ± {100 * statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
    return [
        label(strategy),
        group.recipe,
        f"{_gain_text(statistics.fmean(gains))}{spread}",
        _gain_text(published),
        f"{compute / 1e15:.3g}",
        f"{compute / base:.2f}" + ("" if published is None else f" / {COMPUTE[strategy]:.2f}"),
        str(len(gains)),
        word,
    ]


def training_compute(run: CellResult, plain: CellResult) -> float:
    """FLOPs of a run's training, and of the plain network's where it starts from that; exits' own left out."""
    own = flops_of_training(run.config, run.plain_flops * run.n_train, run.epochs)
    return own if run.config.init is None else own + training_compute(plain, plain)


def _tried(groups: Sequence[Group], data: str, network: str) -> list[tuple[Group, str, list[CellResult]]]:
    """What was trained of a network, of one recipe, length and strategy together."""
    found = [
        (group, strategy, [run for run in group.of(network, strategy) if not run.flaws and not run.label_smoothing])
        for group in groups
        if group.data == data
        for strategy in STRATEGIES
    ]
    return [(group, strategy, runs) for group, strategy, runs in found if runs]


def _with_plain(runs: Sequence[CellResult], plain: Sequence[CellResult]) -> list[tuple[CellResult, CellResult]]:
    """Runs whose Max was measured, each with the plain network of its seed."""
    by_seed = {run.config.seed: run for run in plain if not run.label_smoothing}
    return [(run, by_seed[run.config.seed]) for run in runs if run.within(None) and run.config.seed in by_seed]


def _gain_text(gain: float | None) -> str:
    return "–" if gain is None else signed(100 * gain)
