"""The paper's claims, one verdict each, from results alone.

Each verdict says by what rule it was found. Runs on incomplete data, of data sets or networks that the paper does not
have, or too short to tell test nothing. A plain network is compared with the strategies that share its data, recipe,
length and seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from shallowdeep.studies.paper.evidence import (
    HALF_A_POINT,
    Figures,
    counted_as,
    direction,
    evidence,
    in_per_cent,
    in_points,
    mean,
    reaches,
    summary,
    untested,
)
from shallowdeep.studies.paper.layout import label, signed, title_of_network
from shallowdeep.studies.paper.matrix import NETWORKS
from shallowdeep.studies.paper.published import DESTRUCTIVE, GAIN, TABLE_3, WASTEFUL, published_gain
from shallowdeep.studies.paper.savings import pairs, saved, without_smoothing
from shallowdeep.studies.results import CellResult
from shallowdeep.studies.tasks import title_of

NEAR = 0.05
"""Distance within which a published share counts as met, and by which a saving beats what was claimed of it."""
PUBLISHED = ("ic_only", "joint")
"""The paper's ways of training exits; mixed training is not among them."""
STANDS_OUT = "stands out from zero (by two standard errors over the runs; of fewer than three, each by half a point)"

Word = Literal["held", "beaten", "not held", "undecided", "not tested yet"]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: what was published, a sentence.
        word: the verdict.
        found: what was found here, with the number of runs and images and the spread; or what a test needs.
        rule: what decides, a sentence; empty where nothing was tested.
    """

    claim: str
    word: Word
    found: str
    rule: str = ""


def judge(results: Sequence[CellResult]) -> list[Verdict]:
    """A verdict on every claim but the one on backdoors."""
    judged = [result for result in results if not reasons_against(result)]
    return [claim(judged) for claim in CLAIMS]


def judge_mixed(results: Sequence[CellResult]) -> list[Verdict]:
    """The claims on savings and gains, asked of mixed training, which the paper does not have."""
    judged = [result for result in results if not reasons_against(result)]
    return [
        half_saved_on_cifar(judged, "mixed"),
        quarter_saved_on_tiny(judged, "mixed"),
        accuracy_gained(judged, ("mixed",)),
    ]


def reasons_against(result: CellResult) -> tuple[str, ...]:
    """Why no claim is judged by a run; empty where claims are."""
    foreign = []
    if result.config.data not in WASTEFUL:
        foreign.append("no data set of the paper")
    if result.config.network not in NETWORKS:
        foreign.append("no network of the paper")
    return (*foreign, *result.flaws)


def half_saved_on_cifar(results: Sequence[CellResult], strategy: str = "joint") -> Verdict:
    """Early exits save over half of the cost on CIFAR."""
    claim = (
        f"Early exits after {strategy} training save more than 50 % of the cost on CIFAR, at the network's accuracy."
    )
    return _saving(claim, results, strategy, ("cifar10", "cifar100"), 0.5)


def quarter_saved_on_tiny(results: Sequence[CellResult], strategy: str = "joint") -> Verdict:
    """Early exits save over a quarter of the cost on Tiny ImageNet."""
    claim = "On Tiny ImageNet they save more than 25 %."
    return _saving(claim, results, strategy, ("tinyimagenet",), 0.25)


def quarter_saved_by_exits_alone(results: Sequence[CellResult]) -> Verdict:
    """Exits on a frozen network save over a quarter of the cost."""
    claim = "With IC-only training they still save more than 25 %."
    return _saving(claim, results, "ic_only", tuple(WASTEFUL), 0.25)


def accuracy_gained(results: Sequence[CellResult], strategies: Sequence[str] = PUBLISHED) -> Verdict:
    """Early exits at the best threshold are more accurate than the plain network."""
    claim = "Leaving early at the best threshold is more accurate than the plain network."
    gains = _gains(results, strategies)
    if not gains:
        wanted = " or ".join(_a(strategy) for strategy in strategies)
        return Verdict(claim, "not tested yet", f"It takes {wanted} run and its plain one.")
    shared = [(run, gain, _published_gain(run)) for run, gain in gains]
    known = [(gain, published) for _, gain, published in shared if published is not None]
    found = f"The gain is {summary(gains, in_points)}; {evidence(gains)}."
    more = bool(known) and statistics.fmean(g for g, _ in known) > statistics.fmean(p for _, p in known)
    if known:
        found += (
            f" In the {counted_as(len(known), 'run')} with a published counterpart it is "
            f"{in_points(statistics.fmean(g for g, _ in known))}, published are "
            f"{in_points(statistics.fmean(p for _, p in known))}, of thresholds chosen on test."
        )
    if theirs := _gains(results, strategies, as_published=True):
        found += (
            f" By the paper's rule for images that no exit is sure of, the most confident exit's answer, it is "
            f"{summary(theirs, in_points)} ({counted_as(len(theirs), 'run')})."
        )
    rule = f"Held where the mean gain {STANDS_OUT}; beaten where it also passes the published gains of the same cells."
    return Verdict(claim, _by_direction(direction(gains), more), found, rule)


def gain_up_to(results: Sequence[CellResult]) -> Verdict:
    """The largest gain, relative to the plain accuracy, is the published one."""
    claim = f"The gain is up to {100 * GAIN[0]:.0f} % (the paper), up to {100 * GAIN[1]:.0f} % (the talk)."
    found = _gains(results, PUBLISHED)
    gains = [(run, gain / (within - gain)) for run, gain in found if (within := _max_accuracy(run)) > gain]
    if not gains:
        return Verdict(claim, "not tested yet", "It takes an IC-only or a joint run and its plain one.")
    data, network = max(TABLE_3, key=lambda cell: TABLE_3[cell].joint / TABLE_3[cell].plain)
    where = f"{title_of_network(network)} on {title_of(data)}"
    run, largest = max(gains, key=lambda pair: pair[1])
    said = f"The largest is {signed(100 * largest)} % of the plain accuracy ({run.name}); {evidence(gains)}."
    was_run = any((run.config.data, run.config.network) == (data, network) for run, _ in gains)
    said += "" if was_run else f" {where}, whose gain is the largest that is known of the paper, has not been run."
    word: Word = "not held" if was_run else "undecided"
    word = "beaten" if largest > GAIN[1] else "held" if reaches(largest, GAIN[0]) else word
    rule = (
        f"Taken as a share of the plain accuracy; whether it was meant so is not known. Held from "
        f"{100 * GAIN[0]:.0f} % on, beaten above {100 * GAIN[1]:.0f} %; undecided below until {where} has been run."
    )
    return Verdict(claim, word, said, rule)


def joint_training_harmless(results: Sequence[CellResult]) -> Verdict:
    """The last exit of a jointly trained network is as accurate as the plain network."""
    claim = "Joint training does not hurt an off-the-shelf network: its last exit stays as accurate."
    changes = [(run, run.accuracy - plain.accuracy) for run, plain in pairs(results, ("joint",))]
    if not changes:
        return Verdict(claim, "not tested yet", "It takes a joint run and its plain one.")
    change = mean(changes)
    word: Word = "beaten" if change > HALF_A_POINT else "held" if reaches(change, -HALF_A_POINT) else "not held"
    found = f"It changes by {summary(changes, in_points)}; {evidence(changes)}."
    rule = "Held where the mean change is no loss of more than half a point; beaten where it is a gain of more."
    return Verdict(claim, word, found, rule)


def wasteful_on_most(results: Sequence[CellResult], data: str) -> Verdict:
    """The largest wasteful share on a data set is the published one."""
    claim = f"Computation is wasteful on up to {100 * WASTEFUL[data]:.0f} % of the samples of {title_of(data)}."
    shares = [(run, run.overthinking.wasteful) for run in _with_exits(results) if run.config.data == data]
    if not shares:
        return Verdict(claim, "not tested yet", f"It takes a run with internal exits on {title_of(data)}.")
    largest = max(share for _, share in shares)
    missing = [name for name in NETWORKS if all(run.config.network != name for run, _ in shares)]
    found = f"The largest share is {in_per_cent(largest)}; {evidence(shares)}."
    word: Word = "undecided" if missing else "not held"
    word = "held" if reaches(largest, WASTEFUL[data] - NEAR) else word
    rule = (
        f"Held where the largest share is {100 * (WASTEFUL[data] - NEAR):.0f} % or more; undecided below until all "
        "four networks have been run."
    )
    return Verdict(claim, word, found, rule)


def half_of_errors_destructive(results: Sequence[CellResult]) -> Verdict:
    """About half of the errors had been right before."""
    claim = "About half of a network's errors are destructive: an earlier exit had the right answer."
    shares = [(run, run.overthinking.destructive_of_errors) for run in _with_exits(results)]
    if not shares:
        return Verdict(claim, "not tested yet", "It takes a run with internal exits.")
    found = f"It is {summary(shares, in_per_cent)} of them; {evidence(shares)}."
    word: Word = "held" if reaches(0.1, abs(mean(shares) - DESTRUCTIVE)) else "not held"
    return Verdict(claim, word, found, "Held where the mean is from 40 to 60 %.")


def confusion_misses_fewer(results: Sequence[CellResult]) -> Verdict:
    """Confusion finds more of the errors than confidence; runs with label smoothing test nothing."""
    claim = "Confusion tells wrong answers from right ones with fewer false negatives than confidence."
    runs = [(run, run.confusion) for run in without_smoothing(_with_exits(results)) if run.confusion is not None]
    if not runs:
        return Verdict(claim, "not tested yet", "It takes a run with internal exits and without label smoothing.")
    fewer = [(run, found.wrong_above_correct_mean_confidence - found.wrong_below_correct_mean) for run, found in runs]
    missed = statistics.fmean(found.wrong_below_correct_mean for _, found in runs)
    unseen = statistics.fmean(found.wrong_above_correct_mean_confidence for _, found in runs)
    areas = [statistics.fmean(found.auroc[name] for _, found in runs) for name in ("confusion", "max-softmax")]
    found = (
        f"An alarm at the mean right answer misses {100 * missed:.1f} % of the errors by confusion, "
        f"{100 * unseen:.1f} % by confidence; confusion misses fewer in {sum(x > 0 for _, x in fewer)} of {len(runs)} "
        f"runs. AUROC {areas[0]:.3f} against {areas[1]:.3f}; {evidence(fewer)}."
    )
    everywhere = all(x > 0 for _, x in fewer) and all(f.auroc["confusion"] > f.auroc["max-softmax"] for _, f in runs)
    rule = (
        f"Held where confusion misses fewer and the mean difference {STANDS_OUT}; beaten where it also misses fewer "
        "in every run, with the larger AUROC."
    )
    return Verdict(claim, _by_direction(direction(fewer), everywhere), found, rule)


CLAIMS: tuple[Callable[[Sequence[CellResult]], Verdict], ...] = (
    half_saved_on_cifar,
    quarter_saved_on_tiny,
    quarter_saved_by_exits_alone,
    accuracy_gained,
    gain_up_to,
    joint_training_harmless,
    *(partial(wasteful_on_most, data=data) for data in WASTEFUL),
    half_of_errors_destructive,
    confusion_misses_fewer,
)


def _by_direction(sign: int, more: bool) -> Word:
    """From where a mean points; ``more``: than was claimed."""
    return "undecided" if sign == 0 else "not held" if sign < 0 else "beaten" if more else "held"


def _saving(claim: str, results: Sequence[CellResult], strategy: str, data: Sequence[str], bound: float) -> Verdict:
    found = [pair for pair in pairs(without_smoothing(results), (strategy,)) if pair[0].config.data in data]
    found = [pair for pair in found if pair[0].curve]
    if not found:
        needed = " or ".join(title_of(name) for name in data)
        return Verdict(claim, "not tested yet", f"It takes {_a(strategy)} run and its plain one on {needed}.")
    savings, changes = saved(found, 0.0)
    held = mean(savings) > bound and reaches(mean(changes), -HALF_A_POINT)
    beaten = all(reaches(saving, bound + NEAR) for _, saving in savings) and all(
        reaches(change, -HALF_A_POINT) for _, change in changes
    )
    said = (
        f"Saved are {summary(savings, in_per_cent)}, at {in_points(mean(changes))} from the plain accuracy; "
        f"{evidence(savings)}.{untested(savings, data)}"
    )
    if nothing := sum(saving <= 0 for _, saving in savings):
        said += (
            f" In {nothing} of {counted_as(len(savings), 'run')} no threshold has the plain network's accuracy on the "
            "images that choose it, so all go to the end."
        )
    nearly, less = saved(found, HALF_A_POINT)
    said += (
        f" With half a point less asked of those images, {summary(nearly, in_per_cent)} are saved, at "
        f"{in_points(mean(less))}."
    )
    unheld = sum(not (run.val_accuracy and plain.val_accuracy) for run, plain in found)
    if unheld:
        said += f" Without validation images, the budget was chosen on the test images themselves in {unheld} of them."
    rule = (
        f"Held where the mean saving is above {100 * bound:.0f} % and the mean accuracy at most half a point below the "
        f"plain one; beaten where every run by itself saves {100 * (bound + NEAR):.0f} %, with that accuracy."
    )
    return Verdict(claim, "beaten" if beaten else "held" if held else "not held", said, rule)


def _with_exits(results: Sequence[CellResult]) -> list[CellResult]:
    """Runs of the paper's own ways to train exits."""
    return [result for result in results if result.strategy in PUBLISHED]


def _gains(results: Sequence[CellResult], strategies: Sequence[str], *, as_published: bool = False) -> Figures:
    """Accuracy of the best threshold, chosen on validation, over the plain network's."""
    found = [
        (run, run.within(None, as_published=as_published), plain)
        for run, plain in pairs(without_smoothing(results), strategies)
    ]
    return [(run, row.accuracy - plain.accuracy) for run, row, plain in found if row and row.accuracy is not None]


def _max_accuracy(run: CellResult) -> float:
    row = run.within(None)
    return run.accuracy if row is None or row.accuracy is None else row.accuracy


def _published_gain(run: CellResult) -> float | None:
    return None if run.strategy == "mixed" else published_gain(run.config.data, run.config.network, run.strategy)


def _a(strategy: str) -> str:
    return f"a{'n' if strategy == 'ic_only' else ''} {label(strategy)}"
