"""Each claim's verdict: held, beaten, not held and not tested, from results made up for it."""

from dataclasses import replace

import pytest

from shallowdeep.analysis.backdoor import BackdoorEffect, BackdoorWithPolicy
from shallowdeep.config import BackdoorChoice, RunConfig
from shallowdeep.studies.paper import claims
from shallowdeep.studies.paper.attacks import backdoor_undone
from shallowdeep.studies.paper.claims import judge
from shallowdeep.studies.paper.evidence import direction, spread_over_seeds
from shallowdeep.studies.paper.layout import groups_of
from shallowdeep.studies.paper.matrix import DATA, NETWORKS
from shallowdeep.studies.paper.savings import saved_at_plain_accuracy, show_savings
from shallowdeep.studies.results import BackdoorResult
from shallowdeep.studies.tasks import title_of

CHEAP, HALF, DEAR = (0.72, 0.71, 0.3), (0.71, 0.705, 0.49), (0.70, 0.70, 0.9)


def verdicts(claim, *groups):
    return [claim(list(group)).word for group in groups]


@pytest.mark.parametrize(
    ("claim", "strategy", "data", "bound"),
    [
        (claims.half_saved_on_cifar, "joint", "cifar10", 0.5),
        (claims.quarter_saved_on_tiny, "joint", "tinyimagenet", 0.25),
        (claims.quarter_saved_by_exits_alone, "ic_only", "cifar100", 0.25),
    ],
)
def test_savings(make_result, claim, strategy, data, bound):
    def run(saving, accuracy=0.70, seed=0):
        return make_result(strategy, data=data, seed=seed, curve=[(0.6, 0.6, 0.1), (0.70, accuracy, 1 - saving)])

    plain = [make_result(data=data, seed=seed) for seed in (0, 1)]
    assert verdicts(
        claim,
        [],
        plain,
        [run(0.9)],  # its plain network is missing
        [*plain, run(bound + 0.05), run(bound + 0.2, seed=1)],
        [*plain, run(bound + 0.04), run(bound + 0.2, seed=1)],  # no more than was claimed, in one of them
        [*plain, run(bound + 0.1), run(bound + 0.2, seed=1, accuracy=0.694)],  # at a loss, in one of them
        [*plain, run(bound + 0.1, accuracy=0.695)],  # half a point is the same
        [*plain, run(bound - 0.01), run(bound + 0.2, seed=1)],
        [*plain, run(bound - 0.01), run(bound - 0.2, seed=1)],
        [*plain, run(bound + 0.2, accuracy=0.69)],  # saved on validation, at a loss on test
    ) == [*["not tested yet"] * 3, "beaten", "held", "held", "beaten", "held", "not held", "not held"]
    found = claim([*plain, run(bound + 0.1), run(bound + 0.2, seed=1)]).found
    assert (
        f"Saved are {100 * bound + 15:.1f} % on average ({100 * bound + 10:.1f} % to {100 * bound + 20:.1f} %)" in found
    )
    assert "at +0.00 points from the plain accuracy" in found
    assert (
        f"n = 2 runs (VGG-16 on {title_of(data)}), 10,000 test images, ±7.07 points between the seeds of 1 cell."
        in found
    )
    others = {"cifar10": " Not tested on CIFAR-100.", "cifar100": " Not tested on CIFAR-10 and Tiny ImageNet."}
    assert f"the seeds of 1 cell.{others.get(data, '')} With half a point less" in found


def test_a_saving_of_nothing_is_explained_and_half_a_point_less_is_said(make_result):
    plain = make_result(data="cifar10", accuracy=0.9, val_accuracy=0.71)
    joint = make_result("joint", data="cifar10", curve=[(0.6, 0.6, 0.1), (0.705, 0.89, 0.4), (0.709, 0.9, 0.8)])
    found = claims.half_saved_on_cifar([plain, joint]).found
    assert "In 1 of 1 run no threshold has the plain network's accuracy on the images that choose it" in found
    assert "With half a point less asked of those images, 60.0 % are saved, at −1.00 points." in found
    joint = make_result("joint", data="cifar10", curve=[(0.705, 0.89, 0.4), (0.71, 0.9, 0.8)])
    assert "no threshold" not in claims.half_saved_on_cifar([plain, joint]).found


def test_saving_is_chosen_on_validation(make_result):
    plain = make_result(accuracy=0.8, val_accuracy=0.7)
    joint = make_result("joint", curve=[(0.69, 0.9, 0.2), (0.7, 0.6, 0.4), (0.8, 0.8, 0.5)])
    assert saved_at_plain_accuracy(joint, plain) == (0.6, 0.6)
    assert saved_at_plain_accuracy(make_result("joint", curve=[(0.69, 0.9, 0.2)]), plain) == (pytest.approx(-0.01), 0.7)
    without = make_result(accuracy=0.8, n_train=50_000, n_val=0)  # trained on all: halves of test chose
    joint = make_result("joint", n_train=50_000, n_val=0, curve=[(0.79, 0.79, 0.3), (0.81, 0.8, 0.4)])
    assert saved_at_plain_accuracy(joint, without) == (0.6, 0.8)
    above = 0.1 + 0.2  # pooled from two halves, it may come out an ulp above 0.3, or below it
    without = make_result(accuracy=above, n_train=50_000, n_val=0)
    joint = make_result("joint", n_train=50_000, n_val=0, curve=[(0.3, 0.3, 0.4), (0.8, 0.8, 0.5)])
    assert saved_at_plain_accuracy(joint, without) == (0.6, 0.3)


def test_what_the_test_images_chose_is_named(make_result):
    more = {"data": "cifar10", "recipe": "paper", "n_train": 50_000, "n_val": 0}
    chosen = "the budget was chosen on the test images themselves in 1 of them"
    fair = [make_result(data="cifar10"), make_result("joint", data="cifar10", curve=[CHEAP])]
    assert (
        chosen
        in claims.half_saved_on_cifar([*fair, make_result(**more), make_result("joint", curve=[CHEAP], **more)]).found
    )
    assert "themselves" not in claims.half_saved_on_cifar(fair).found


def test_accuracy_gained(make_result):
    def joint(accuracy, **more):
        return make_result("joint", within={None: (accuracy, 0.8)}, **more)

    plain = make_result()
    assert verdicts(
        claims.accuracy_gained,
        [plain],
        [plain, joint(0.71)],
        [plain, joint(0.74)],  # published for this cell: 3.5 points
        [plain, joint(0.70)],
        [plain, joint(0.705)],  # half a point is nothing
        [plain, joint(0.69)],
        [make_result(data="cifar10"), joint(0.9, data="cifar10")],  # no published counterpart to beat
    ) == ["not tested yet", "held", "beaten", "undecided", "undecided", "not held", "held"]
    found = claims.accuracy_gained([plain, joint(0.71)]).found
    assert "The gain is +1.00 points; n = 1 run (VGG-16 on CIFAR-100), 10,000 test images, one seed." in found
    assert "In the 1 run with a published counterpart it is +1.00 points, published are +3.50 points" in found


def test_gain_up_to(make_result):
    plain = make_result()
    runs = [make_result("ic_only", within={None: (accuracy, 0.8)}) for accuracy in (0.72, 0.76, 0.78)]
    assert verdicts(claims.gain_up_to, [plain], *([plain, run] for run in runs)) == [
        "not tested yet", "undecided", "held", "beaten",
    ]  # fmt: skip
    largest = {"data": "tinyimagenet", "n_train": 90_000, "n_val": 10_000}  # the cell of the largest published gain
    tiny = [make_result(**largest), make_result("ic_only", within={None: (0.72, 0.8)}, **largest)]
    assert claims.gain_up_to([plain, runs[0], *tiny]).word == "not held"
    assert "VGG-16 on Tiny ImageNet, whose gain" in claims.gain_up_to([plain, runs[0]]).found
    assert "whose gain" not in claims.gain_up_to(tiny).found
    assert (
        "+2.86 % of the plain accuracy (cifar100/vgg16/ic_only-fast-seed0)" in claims.gain_up_to([plain, runs[0]]).found
    )
    loss = make_result("ic_only", within={None: (0.6998, 0.8)})
    assert "The largest is −0.03 % of the plain accuracy" in claims.gain_up_to([plain, loss]).found


def test_joint_training_harmless(make_result):
    plain = make_result()
    runs = [make_result("joint", accuracy=accuracy) for accuracy in (0.69, 0.697, 0.703, 0.72)]
    assert verdicts(claims.joint_training_harmless, [plain], *([plain, run] for run in runs)) == [
        "not tested yet", "not held", "held", "held", "beaten",
    ]  # fmt: skip
    assert "It changes by −1.00 points" in claims.joint_training_harmless([plain, runs[0]]).found


def test_wasteful_on_most(make_result):
    def run(share, data="cifar100", seed=0):
        return make_result("joint", data=data, seed=seed, wasteful=share)

    def on_cifar100(results):
        return claims.wasteful_on_most(results, "cifar100")

    assert verdicts(
        on_cifar100,
        [make_result()],
        [run(0.5), run(0.77, seed=1)],  # the largest counts
        [run(0.75)],
        [run(0.9, data="cifar10")],  # says nothing of other data
        [run(0.77), run(0.8, data="cifar10")],
    ) == ["not tested yet", "held", "undecided", "not tested yet", "held"]
    four = [make_result("joint", network=network, wasteful=0.75) for network in NETWORKS]
    assert on_cifar100(four).word == "not held"
    assert "The largest share is 77.0 %; n = 1 run (VGG-16 on CIFAR-100)," in on_cifar100([run(0.77)]).found


def test_a_verdict_holds_of_the_data_it_was_tested_on(make_result):
    run = make_result("ic_only", data="cifar10", wasteful=0.96)
    words = {verdict.claim: verdict.word for verdict in judge([run]) if "wasteful" in verdict.claim}
    assert words == {
        "Computation is wasteful on up to 95 % of the samples of CIFAR-10.": "held",
        "Computation is wasteful on up to 81 % of the samples of CIFAR-100.": "not tested yet",
        "Computation is wasteful on up to 69 % of the samples of Tiny ImageNet.": "not tested yet",
    }


def test_thresholds_of_smoothed_networks_test_nothing(make_result):
    """Neither a run with label smoothing nor one whose plain network has it counts where confidence decides."""
    for smoothed, other in ((0.1, None), (None, 0.1)):
        results = [
            make_result(data=data, label_smoothing=smoothed, **sizes(data))
            for data in ("cifar10", "cifar100", "tinyimagenet")
        ]
        results += [
            make_result(strategy, data=data, curve=[CHEAP], label_smoothing=other, **sizes(data))
            for data in ("cifar10", "cifar100", "tinyimagenet")
            for strategy in ("ic_only", "joint", "mixed")
        ]
        found = [*judge(results), *claims.judge_mixed(results)]
        by_confidence = [
            verdict.word for verdict in found if "save" in verdict.claim or "gain" in verdict.claim.lower()
        ]
        assert by_confidence == ["not tested yet"] * 6
        assert found[3].word == found[-1].word == "not tested yet"
        assert "held" in {verdict.word for verdict in found}  # what needs no confidence is judged


def test_mixed_training_says_nothing_of_the_papers_claims(make_result):
    mixed = make_result("mixed", data="cifar10", wasteful=0.96, destructive=0.5)
    assert {verdict.word for verdict in judge([make_result(data="cifar10"), mixed])} == {"not tested yet"}


def test_mixed_training_is_judged_by_itself(make_result):
    plain = make_result(data="cifar10")
    joint = make_result("joint", data="cifar10", curve=[(0.7, 0.7, 0.9)])
    mixed = make_result("mixed", data="cifar10", curve=[(0.7, 0.7, 0.3)], within={None: (0.76, 0.8)})
    results = [plain, joint, mixed]
    found = claims.judge_mixed(results)
    assert [verdict.word for verdict in found] == ["beaten", "not tested yet", "held"]
    assert "after mixed training" in found[0].claim
    assert "The gain is +6.00 points; n = 1 run (VGG-16 on CIFAR-10)" in found[2].found
    assert claims.half_saved_on_cifar(results).word == "not held"  # joint training alone
    assert {verdict.word for verdict in claims.judge_mixed([plain, joint])} == {"not tested yet"}
    assert claims.judge_mixed([])[2].found == "It takes a mixed run and its plain one."
    on_cifar100 = [make_result(), make_result("mixed", within={None: (0.9, 0.8)})]
    assert claims.judge_mixed(on_cifar100)[2].word == "held"  # there is no published gain of it to beat


def sizes(data):
    """Images of a complete training."""
    return {"n_train": 90_000, "n_val": 10_000} if data == "tinyimagenet" else {}


def test_half_of_errors_destructive(make_result):
    def run(share, seed=0):
        return make_result("ic_only", destructive=share, seed=seed)

    assert verdicts(
        claims.half_of_errors_destructive, [make_result()], [run(0.3), run(0.7, 1)], [run(0.3)], [run(0.65)]
    ) == ["not tested yet", "held", "not held", "not held"]


def test_confusion_misses_fewer(make_result):
    def run(missed, area=0.7, seed=0, **more):
        confusion = {"missed": missed, "missed_by_confidence": 0.2, "area": area, "area_of_confidence": 0.8}
        return make_result("joint", confusion=confusion, seed=seed, **more)

    assert verdicts(
        claims.confusion_misses_fewer,
        [make_result()],
        [run(0.1, label_smoothing=0.1)],
        [run(0.1)],
        [run(0.1, area=0.9)],
        [run(0.1, area=0.9), run(0.25, area=0.9, seed=1)],
        [run(0.1), run(0.29, seed=1), run(0.19, seed=2)],  # now more, now fewer
        [run(0.3)],
    ) == ["not tested yet", "not tested yet", "held", "beaten", "undecided", "undecided", "not held"]
    found = claims.confusion_misses_fewer([run(0.1), run(0.25, seed=1)]).found
    assert "misses 17.5 % of the errors by confusion, 20.0 % by confidence" in found
    assert "fewer in 1 of 2 runs. AUROC 0.700 against 0.800" in found


AUROC = {"confusion": 0.8, "max-softmax": 0.4}


def effect(accuracy: float, with_policy: float | None, success: float = 0.9) -> BackdoorEffect:
    policy = None if with_policy is None else BackdoorWithPolicy({}, 0.9, with_policy, 0.1, 0.5, 0.5)
    return BackdoorEffect(
        10_000, 9_000, 5, (0.9,), (0.1,), (accuracy,), (success,), policy, 0.0, 1.0, 0.9, 0.9, AUROC, {}
    )


def attacked(
    accuracy: float,
    with_policy: float | None,
    success: float = 0.9,
    *,
    data: str = "cifar10",
    network: str = "vgg16",
    rate: float = 0.0,
) -> BackdoorResult:
    backdoor = BackdoorChoice(target="dog", rate=rate)
    config = RunConfig(data=data, network=network, strategy="ic_only", init="attacked", backdoor=backdoor)
    return BackdoorResult(config=config, effect=effect(accuracy, with_policy, success))


def test_backdoor_undone():
    found = [backdoor_undone([attacked(0.12, after)]) for after in (None, 0.85, 0.79, 0.30)]
    assert [verdict.word for verdict in found] == ["not tested yet", "beaten", "held", "not held"]
    assert found[1].found == (
        "From 12.0 to 85.0 % on triggered samples, and attack success from 90.0 to 10.0 %; accuracy on clean samples "
        "from 90.0 to 90.0 %, at 50.0 % of the cost (n = 1 run of VGG-16, 9,000 triggered images). "
        "Confusion tells triggered samples from clean ones with an AUROC of 0.800, max-softmax with 0.400."
    )
    assert "no policy (1 run)" in found[0].found
    assert backdoor_undone([]).word == "not tested yet"


def test_only_a_backdoor_that_works_on_cifar10_is_undone():
    harmless, digits = attacked(0.915, 0.91, 0.01), attacked(0.12, 0.9, data="digits")
    verdict = backdoor_undone([harmless])
    assert verdict.word == "not tested yet"
    assert verdict.found.endswith("Left out: the attack did not work, 1.0 % success (1 run).")
    assert backdoor_undone([digits]).found.endswith("Left out: not CIFAR-10 but digits (1 run).")
    assert backdoor_undone([digits, harmless, attacked(0.12, 0.3)]).word == "not held"
    assert backdoor_undone([attacked(0.12, 0.85, 0.5)]).word == "beaten"


def test_a_backdoor_that_is_not_the_papers_tests_nothing():
    poisoned, foreign = attacked(0.12, 0.9, rate=0.05), attacked(0.12, 0.9, network="resnet20")
    assert backdoor_undone([poisoned]).found.endswith("Left out: exits that learned from poisoned images (1 run).")
    assert backdoor_undone([foreign]).found.endswith("Left out: no network of the paper but resnet20 (1 run).")


def test_a_backdoor_undone_at_the_expense_of_clean_samples_is_not_undone():
    dear = attacked(0.12, 0.85)
    before = replace(dear.effect, clean_accuracy=(0.96,))  # 0.9 with the policy
    assert backdoor_undone([dear.model_copy(update={"effect": before})]).word == "not held"


def test_incomplete_and_other_data_test_nothing(make_result):
    some = {"n_train": 13_500, "n_val": 1_500, "data": "tinyimagenet"}
    results = [make_result(**some), make_result("joint", curve=[CHEAP], **some)]
    results += [make_result(data="digits"), make_result("joint", data="digits", curve=[CHEAP])]
    assert {verdict.word for verdict in judge(results)} == {"not tested yet"}
    results += [make_result(network="resnet20"), make_result("joint", network="resnet20", curve=[CHEAP])]
    assert {verdict.word for verdict in judge(results)} == {"not tested yet"}
    assert len(judge(results)) == 11


def test_a_short_training_tests_nothing(make_result):
    def runs(epochs):
        return [
            make_result(epochs=epochs),
            *(make_result(s, epochs=epochs, curve=[CHEAP]) for s in ("ic_only", "joint")),
        ]

    assert {verdict.word for verdict in judge(runs(19))} == {"not tested yet"}
    assert {verdict.word for verdict in judge(runs(20))} != {"not tested yet"}
    long = judge(runs(None))
    assert judge([*runs(None), *runs(1)]) == long
    assert "IC-only" in long[2].claim
    assert long[2].word == "beaten"  # exits alone are trained for ten epochs, the network under them for thirty


def test_every_claim_is_judged_from_whole_results(make_result):
    results = [
        make_result(strategy, data=data, curve=[CHEAP, HALF, DEAR], **sizes(data))
        for data in ("cifar10", "cifar100", "tinyimagenet")
        for strategy in ("plain", "ic_only", "joint", "mixed")
    ]
    assert "not tested yet" not in {verdict.word for verdict in judge(results)}


def test_spread_is_between_seeds_alone(make_result):
    runs = [make_result("joint", network=network, seed=seed) for network in ("vgg16", "resnet56") for seed in (0, 1)]
    assert spread_over_seeds(list(zip(runs, (0.1, 0.1, 0.9, 0.9), strict=True))) == (0.0, 2)
    assert spread_over_seeds(list(zip(runs, (0.1, 0.3, 0.9, 0.9), strict=True))) == (pytest.approx(0.1), 2)
    assert spread_over_seeds([(runs[0], 0.1), (runs[2], 0.9)]) == (None, 0)
    assert spread_over_seeds([(runs[0], 0.1), (make_result("joint", epochs=25), 0.9)]) == (None, 0)
    assert spread_over_seeds([(runs[0], 0.1), (make_result("mixed", seed=1), 0.9)]) == (None, 0)


def test_what_stands_out_from_zero(make_result):
    run = make_result("joint")
    assert [direction([(run, value)]) for value in (0.004, 0.005, 0.006, -0.006)] == [0, 0, 1, -1]
    assert direction([(run, 0.01), (run, 0.02)]) == 1
    assert direction([(run, 0.02), (run, 0.001)]) == direction([(run, 0.02), (run, -0.01)]) == 0
    assert direction([(run, value) for value in (0.001, 0.001, 0.001)]) == 1  # of three, their own spread says it
    assert direction([(run, value) for value in (0.03, -0.01, 0.01)]) == 0
    assert direction([(run, value) for value in (-0.03, -0.02, -0.04)]) == -1


def test_savings_run_by_run(make_result):
    plain = make_result(data="cifar10", accuracy=0.9, val_accuracy=0.71)
    joint = make_result("joint", data="cifar10", curve=[(0.6, 0.6, 0.1), (0.705, 0.89, 0.4), (0.709, 0.9, 0.8)])
    smoothed = make_result("mixed", data="cifar10", label_smoothing=0.1, curve=[(0.72, 0.9, 0.3)])
    table = show_savings(groups_of([plain, joint, smoothed], DATA))[-1:]
    assert table == ["| CIFAR-10 | fast | VGG-16 | joint | 0 | 90.00 | none (−20.00) | 60.0 (−1.00) |"]
    assert show_savings(groups_of([plain], DATA)) == ["No network with exits has been run yet beside its plain one."]


def test_shares_of_backdoors_are_averaged():
    two = [attacked(0.1, 0.8), attacked(0.2, 0.9)]
    assert "From 15.0 to 85.0 % on triggered samples" in backdoor_undone(two).found
    assert "n = 2 runs of VGG-16" in backdoor_undone(two).found
    assert backdoor_undone([attacked(0.1, None), two[1]]).word == "beaten"
