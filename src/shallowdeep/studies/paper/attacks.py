"""The paper's claim on backdoors, judged by what attacked networks did."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from shallowdeep.analysis.backdoor import BackdoorEffect, BackdoorWithPolicy
from shallowdeep.studies.paper.claims import NEAR, Verdict, Word
from shallowdeep.studies.paper.evidence import counted_as, in_per_cent, reaches
from shallowdeep.studies.paper.layout import title_of_network
from shallowdeep.studies.paper.matrix import NETWORKS
from shallowdeep.studies.paper.published import BACKDOOR
from shallowdeep.studies.results import BackdoorResult
from shallowdeep.studies.tasks import title_of

ATTACKED = 0.5
"""Attack success at the last exit from which a backdoor is one: the published network, right on 12 % of the triggered
samples, answers most of the others with the target."""


def backdoor_undone(results: Sequence[BackdoorResult]) -> Verdict:
    """Early exits bring the accuracy on triggered samples back; an attack that failed tests nothing."""
    claim = (
        f"On a backdoored network's triggered samples, early exits raise the accuracy from {100 * BACKDOOR[0]:.0f} to "
        f"{100 * BACKDOOR[1]:.0f} %."
    )
    judged: list[tuple[BackdoorResult, BackdoorWithPolicy]] = []
    left = Counter[str]()
    for result in results:
        reason, policy = _reason_against(result), result.effect.with_policy
        if reason is None and policy is not None:
            judged.append((result, policy))
        else:
            left[reason or "no policy"] += 1
    aside = "; ".join(f"{reason} ({counted_as(number, 'run')})" for reason, number in left.items())
    wanted = "It takes one of the paper's networks on CIFAR-10 that the backdoor works on, clean exits and a policy."
    found = _undone(judged) if judged else wanted
    found += f" Left out: {aside}." if aside else ""
    if not judged:
        return Verdict(claim, "not tested yet", found)
    after = statistics.fmean(policy.accuracy for _, policy in judged)
    lost = statistics.fmean(result.effect.clean_accuracy[-1] - policy.clean_accuracy for result, policy in judged)
    word: Word = "beaten" if after > BACKDOOR[1] else "held" if reaches(after, BACKDOOR[1] - NEAR) else "not held"
    rule = (
        f"Held where the accuracy on triggered samples is then {100 * (BACKDOOR[1] - NEAR):.0f} % or more, beaten "
        f"above {100 * BACKDOOR[1]:.0f} %, and clean samples lose no more than five points of accuracy by it."
    )
    return Verdict(claim, word if reaches(NEAR, lost) else "not held", found, rule)


def _reason_against(result: BackdoorResult) -> str | None:
    """Why a backdoor's result does not test the claim; ``None``: it does, where it has a policy."""
    config, effect = result.config, result.effect
    if config.data != "cifar10":
        return f"not CIFAR-10 but {title_of(config.data)}"
    if config.network not in NETWORKS:
        return f"no network of the paper but {title_of_network(config.network)}"
    if config.backdoor.rate:
        return "exits that learned from poisoned images"
    if not reaches(effect.attack_success[-1], ATTACKED):
        return f"the attack did not work, {in_per_cent(effect.attack_success[-1])} success"
    return None


def _undone(judged: Sequence[tuple[BackdoorResult, BackdoorWithPolicy]]) -> str:
    effects, policies = [result.effect for result, _ in judged], [policy for _, policy in judged]
    networks = " and ".join(dict.fromkeys(title_of_network(result.config.network) for result, _ in judged))
    counts = sorted({effect.n_triggered for effect in effects})
    images = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    triggered = _from_to(effects, policies, "accuracy")
    success = _from_to(effects, policies, "attack_success")
    clean = _from_to(effects, policies, "clean_accuracy")
    cost = in_per_cent(statistics.fmean(policy.clean_cost for policy in policies))
    found = {name: statistics.fmean(effect.auroc[name] for effect in effects) for name in ("confusion", "max-softmax")}
    return (
        f"From {triggered} on triggered samples, and attack success from {success}; accuracy on clean samples from "
        f"{clean}, at {cost} of the cost (n = {counted_as(len(judged), 'run')} of {networks}, {images} triggered "
        f"images). Confusion tells triggered samples from clean ones with an AUROC of {found['confusion']:.3f}, "
        f"max-softmax with {found['max-softmax']:.3f}."
    )


def _from_to(effects: Sequence[BackdoorEffect], policies: Sequence[BackdoorWithPolicy], name: str) -> str:
    before = statistics.fmean(getattr(effect, name)[-1] for effect in effects)
    after = statistics.fmean(getattr(policy, name) for policy in policies)
    return f"{100 * before:.1f} to {in_per_cent(after)}"
