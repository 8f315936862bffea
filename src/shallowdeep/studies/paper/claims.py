"""The paper's claims, one verdict each, from results alone.

A claim is *held* where the mean over all runs that test it says so, *beaten* where more than was claimed was found, and
each function says what that means for its claim. Runs on incomplete data, on data sets that the paper does not have, or
too short to tell test nothing. A plain network is compared with the strategies that share its data, recipe, length and
seed.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from shallowdeep.analysis.backdoor import BackdoorEffect
from shallowdeep.studies.paper.evidence import (
    Figures,
    counted_as,
    evidence,
    in_per_cent,
    in_points,
    mean,
    reaches,
    summary,
    untested,
)
from shallowdeep.studies.paper.layout import label, signed
from shallowdeep.studies.paper.published import BACKDOOR, DESTRUCTIVE, GAIN, WASTEFUL, published_gain
from shallowdeep.studies.results import BackdoorResult, CellResult
from shallowdeep.studies.tasks import title_of

HALF_A_POINT = 0.005
"""Accuracies nearer than this count as equal: about one standard error of a share of 10,000 images."""
NEAR = 0.05
"""Distance within which a published share counts as met, and by which a saving beats what was claimed of it."""
ATTACKED = 0.5
"""Attack success at the last exit from which a backdoor is one: the published network, right on 12 % of the triggered
samples, answers most of the others with the target."""

Word = Literal["held", "beaten", "not held", "not tested yet"]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: what was published, a sentence.
        word: the verdict.
        found: what was found here, with the number of runs and images and the spread; or what a test needs.
    """

    claim: str
    word: Word
    found: str


def judge(results: Sequence[CellResult], backdoors: Sequence[BackdoorResult] = ()) -> list[Verdict]:
    """A verdict on every claim."""
    judged = [result for result in results if not reasons_against(result)]
    return [*(claim(judged) for claim in CLAIMS), backdoor_undone(backdoors)]


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
    published = result.config.data in WASTEFUL
    return result.flaws if published else ("no data set of the paper", *result.flaws)


def half_saved_on_cifar(results: Sequence[CellResult], strategy: str = "joint") -> Verdict:
    """Held: such training saves over half on average, at the plain accuracy. Beaten: at least 55 % in every run."""
    claim = (
        f"Early exits after {strategy} training save more than 50 % of the cost on CIFAR, at the network's accuracy."
    )
    return _saving(claim, results, strategy, ("cifar10", "cifar100"), 0.5)


def quarter_saved_on_tiny(results: Sequence[CellResult], strategy: str = "joint") -> Verdict:
    """Held: such training saves over 25 % on average, at the plain accuracy. Beaten: at least 30 % in every run."""
    claim = "On Tiny ImageNet they save more than 25 %."
    return _saving(claim, results, strategy, ("tinyimagenet",), 0.25)


def quarter_saved_by_exits_alone(results: Sequence[CellResult]) -> Verdict:
    """Held: IC-only training saves over 25 % on average, at the plain accuracy. Beaten: at least 30 % in every run."""
    claim = "With IC-only training they still save more than 25 %."
    return _saving(claim, results, "ic_only", tuple(WASTEFUL), 0.25)


def accuracy_gained(results: Sequence[CellResult], strategies: Sequence[str] = ("ic_only", "joint")) -> Verdict:
    """Held: the best threshold gains on average. Beaten: more than published for the same cells."""
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
    return Verdict(claim, "not held" if reaches(0.0, mean(gains)) else "beaten" if more else "held", found)


def gain_up_to(results: Sequence[CellResult]) -> Verdict:
    """Held: the largest relative gain reaches the paper's figure. Beaten: it passes the talk's."""
    claim = f"The gain is up to {100 * GAIN[0]:.0f} % (the paper), up to {100 * GAIN[1]:.0f} % (the talk)."
    found = _gains(results, ("ic_only", "joint"))
    gains = [(run, gain / (within - gain)) for run, gain in found if (within := _max_accuracy(run)) > gain]
    if not gains:
        return Verdict(claim, "not tested yet", "It takes an IC-only or a joint run and its plain one.")
    run, largest = max(gains, key=lambda pair: pair[1])
    said = f"The largest is {signed(100 * largest)} % of the plain accuracy ({run.name}); {evidence(gains)}."
    return Verdict(claim, "beaten" if largest > GAIN[1] else "held" if largest >= GAIN[0] else "not held", said)


def joint_training_harmless(results: Sequence[CellResult]) -> Verdict:
    """Held: the last exit is at most half a point worse on average. Beaten: more than half a point better."""
    claim = "Joint training does not hurt an off-the-shelf network: its last exit stays as accurate."
    changes = [(run, run.accuracy - plain.accuracy) for run, plain in _pairs(results, ("joint",))]
    if not changes:
        return Verdict(claim, "not tested yet", "It takes a joint run and its plain one.")
    change = mean(changes)
    word: Word = "beaten" if change > HALF_A_POINT else "held" if reaches(change, -HALF_A_POINT) else "not held"
    found = f"It changes by {summary(changes, in_points)}; {evidence(changes)}."
    return Verdict(claim, word, found)


def wasteful_on_most(results: Sequence[CellResult], data: str) -> Verdict:
    """Held: on this data set, the largest share comes within five points of the published one, or above it."""
    claim = f"Computation is wasteful on up to {100 * WASTEFUL[data]:.0f} % of the samples of {title_of(data)}."
    shares = [(run, run.overthinking.wasteful) for run in _with_exits(results) if run.config.data == data]
    if not shares:
        return Verdict(claim, "not tested yet", f"It takes a run with internal exits on {title_of(data)}.")
    largest = max(share for _, share in shares)
    found = f"The largest share is {in_per_cent(largest)}; {evidence(shares)}."
    return Verdict(claim, "held" if reaches(largest, WASTEFUL[data] - NEAR) else "not held", found)


def half_of_errors_destructive(results: Sequence[CellResult]) -> Verdict:
    """Held: on average between 40 and 60 % of the errors."""
    claim = "About half of a network's errors are destructive: an earlier exit had the right answer."
    shares = [(run, run.overthinking.destructive_of_errors) for run in _with_exits(results)]
    if not shares:
        return Verdict(claim, "not tested yet", "It takes a run with internal exits.")
    found = f"It is {summary(shares, in_per_cent)} of them; {evidence(shares)}."
    return Verdict(claim, "held" if reaches(0.1, abs(mean(shares) - DESTRUCTIVE)) else "not held", found)


def confusion_misses_fewer(results: Sequence[CellResult]) -> Verdict:
    """Held: an alarm at the mean right answer misses fewer errors by confusion than by confidence, on average.

    Beaten: in every run, with the larger area under the ROC curve as well. Runs with label smoothing test nothing.
    """
    claim = "Confusion tells wrong answers from right ones with fewer false negatives than confidence."
    runs = [(run, run.confusion) for run in _plainly(_with_exits(results)) if run.confusion is not None]
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
    return Verdict(claim, "not held" if reaches(0.0, mean(fewer)) else "beaten" if everywhere else "held", found)


def backdoor_undone(results: Sequence[BackdoorResult]) -> Verdict:
    """Held: with early exits, the accuracy on triggered samples comes within five points of the published one.

    Beaten: it passes that. A network that the attack did not take, or one on other data than CIFAR-10, tests nothing.
    """
    claim = (
        f"On a backdoored network's triggered samples, early exits raise the accuracy from {100 * BACKDOOR[0]:.0f} to "
        f"{100 * BACKDOOR[1]:.0f} %."
    )
    judged, left = [], Counter[str]()
    for result in results:
        reason = _backdoor_reason(result)
        if reason is None:
            judged.append(result.effect)
        else:
            left[reason] += 1
    aside = "; ".join(f"{reason} ({counted_as(number, 'run')})" for reason, number in left.items())
    found = _undone(judged) if judged else "It takes a network on CIFAR-10 that the backdoor works on, and a policy."
    found += f" Left out: {aside}." if aside else ""
    if not judged:
        return Verdict(claim, "not tested yet", found)
    after = _mean_with_policy(judged)
    word: Word = "beaten" if after > BACKDOOR[1] else "held" if reaches(after, BACKDOOR[1] - NEAR) else "not held"
    return Verdict(claim, word, found)


def _backdoor_reason(result: BackdoorResult) -> str | None:
    """Why a backdoor's result does not test the claim; ``None``: it does."""
    if result.data != "cifar10":
        return f"not CIFAR-10 but {title_of(result.data)}"
    if not reaches(result.effect.attack_success[-1], ATTACKED):
        return f"the attack did not work, {in_per_cent(result.effect.attack_success[-1])} success"
    return "no policy" if result.effect.with_policy is None else None


def _mean_with_policy(effects: Sequence[BackdoorEffect]) -> float:
    return statistics.fmean(effect.with_policy.accuracy for effect in effects if effect.with_policy is not None)


def _undone(effects: Sequence[BackdoorEffect]) -> str:
    before = statistics.fmean(effect.accuracy[-1] for effect in effects)
    counts = sorted({effect.n_triggered for effect in effects})
    images = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    return (
        f"From {100 * before:.1f} to {in_per_cent(_mean_with_policy(effects))} "
        f"(n = {counted_as(len(effects), 'run')}, {images} triggered images)."
    )


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


def _saving(claim: str, results: Sequence[CellResult], strategy: str, data: Sequence[str], bound: float) -> Verdict:
    """Held: the mean saving passes the bound, and the mean accuracy is the plain one but for half a point.

    Beaten: every run by itself saves five points more than the bound, and has the plain accuracy but for half a point.
    """
    pairs = [pair for pair in _pairs(_plainly(results), (strategy,)) if pair[0].config.data in data and pair[0].curve]
    if not pairs:
        needed = " or ".join(title_of(name) for name in data)
        return Verdict(claim, "not tested yet", f"It takes {_a(strategy)} run and its plain one on {needed}.")
    savings, changes = _saved(pairs, 0.0)
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
    nearly, less = _saved(pairs, HALF_A_POINT)
    said += (
        f" With half a point less asked of those images, {summary(nearly, in_per_cent)} are saved, at "
        f"{in_points(mean(less))}."
    )
    unheld = sum(not (run.val_accuracy and plain.val_accuracy) for run, plain in pairs)
    if unheld:
        said += f" Without validation images, the budget was chosen on the test images themselves in {unheld} of them."
    return Verdict(claim, "beaten" if beaten else "held" if held else "not held", said)


def _saved(pairs: Sequence[tuple[CellResult, CellResult]], given_up: float) -> tuple[Figures, Figures]:
    """What runs save, and by how much their accuracy then differs from their plain network's."""
    found = [(run, plain, *saved_at_plain_accuracy(run, plain, given_up)) for run, plain in pairs]
    return (
        [(run, saving) for run, _, saving, _ in found],
        [(run, accuracy - plain.accuracy) for run, plain, _, accuracy in found],
    )


def _with_exits(results: Sequence[CellResult]) -> list[CellResult]:
    return [result for result in results if len(result.costs) > 1]


def _pairs(results: Sequence[CellResult], strategies: Sequence[str]) -> list[tuple[CellResult, CellResult]]:
    """Each run of some strategies with its plain network, where that was run."""
    plain = {result.pair: result for result in results if result.strategy == "plain"}
    return [(run, plain[run.pair]) for run in results if run.strategy in strategies and run.pair in plain]


def _plainly(results: Sequence[CellResult]) -> list[CellResult]:
    """Those without label smoothing, which changes every confidence and so what a threshold on it is worth."""
    return [result for result in results if not result.label_smoothing]


def _gains(results: Sequence[CellResult], strategies: Sequence[str]) -> Figures:
    """Accuracy of the best threshold, chosen on validation, over the plain network's."""
    pairs = _pairs(_plainly(results), strategies)
    return [(run, _max_accuracy(run) - plain.accuracy) for run, plain in pairs if run.within(None) is not None]


def _max_accuracy(run: CellResult) -> float:
    row = run.within(None)
    return run.accuracy if row is None or row.accuracy is None else row.accuracy


def _published_gain(run: CellResult) -> float | None:
    return None if run.strategy == "mixed" else published_gain(run.config.data, run.config.network, run.strategy)


def _a(strategy: str) -> str:
    return f"a{'n' if strategy == 'ic_only' else ''} {label(strategy)}"
