"""Thresholds from validation data."""

from __future__ import annotations

from shallowdeep.errors import CalibrationError, ConfigError, TraceError, UnknownName
from shallowdeep.policies.replay import Curve, sweep, sweep_confidence
from shallowdeep.policies.rules import ExitPolicy, Patience
from shallowdeep.traces.trace import Trace, same_samples

FAMILIES = ("confidence", "patience")
REFERENCES = ("last", "original")


def calibrate(
    trace: Trace,
    *,
    max_cost: float | None = None,
    max_accuracy_drop: float | None = None,
    min_agreement: float | None = None,
    reference: str = "last",
    original: Trace | None = None,
    rule: str = "confidence",
    exits: tuple[int, ...] | None = None,
    answer: str = "last",
    allow_test: bool = False,
) -> ExitPolicy:
    """Choose a policy's threshold on validation data.

    Args:
        trace: of the validation split.
        max_cost: budget, mean cost as a share of the plain backbone. Chosen is the highest accuracy within
            it (of equals the cheapest); without labels, the highest agreement with the last exit.
        max_accuracy_drop: accuracy that may be given up, e.g. 0.01 for one in a hundred; below 0 it must be gained.
            Chosen is the lowest cost within it.
        min_agreement: share of answers that must be the last exit's own, e.g. 0.99; needs no labels. Chosen is
            the lowest cost within it. Exactly one of the three is given.
        reference: what the drop is measured from: this network's ``"last"`` exit, or the ``"original"``
            network, trained alone.
        original: the original network's Trace of the same samples, in any order. Not needed after IC-only
            training, whose last exit is the original network.
        rule: ``"confidence"`` or ``"patience"``.
        exits: the internal exits to look at; ``None``: all.
        answer: as for ``Confidence``.
        allow_test: choose on a test split all the same; its accuracy is then no fair figure.

    Returns:
        The policy.

    Raises:
        UnknownName: there is no such rule or reference.
        TraceError: a drop in accuracy is asked for, and the Trace has no labels.
        CalibrationError: the demand cannot be met, a split is the test split, or ``original`` is of other samples.
        ConfigError: several demands or none are given, or a setting that the rule or reference has no use for.

    Cite: Kaya, Hong & Dumitras, ICML 2019, section 5.1; the authors' code chooses on the test split.
    """
    demands = {"max_cost": max_cost, "max_accuracy_drop": max_accuracy_drop, "min_agreement": min_agreement}
    given = {name: value for name, value in demands.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give one of {', '.join(demands)}, got {given or 'none'}.")
    if reference not in REFERENCES:
        raise UnknownName("reference", reference, REFERENCES)
    if max_accuracy_drop is None and reference != "last":
        raise ConfigError(f"reference={reference!r} goes with max_accuracy_drop, not with {next(iter(given))}.")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"an agreement is a share from 0 to 1, got min_agreement={min_agreement}.")
    if max_accuracy_drop is not None and not -1 < max_accuracy_drop < 1:
        raise ConfigError(
            f"a drop in accuracy is a share below 1 (a gain: above -1), got max_accuracy_drop={max_accuracy_drop}."
        )
    if original is not None and reference != "original":
        raise ConfigError(
            f"an original network is given, but the drop is measured from {reference!r}: pass reference='original'."
        )
    for source in () if allow_test else (trace, original):
        if source is not None:
            refuse_test(source)
    if min_agreement is not None or (max_cost is not None and trace.labels is None):
        trace = trace.as_agreement()
    whole = trace.costs.relative()[-1].item()
    if max_cost is not None and not max_cost <= 2 * whole:
        raise ConfigError(
            f"a cost is a share of the plain network's, 0.5 for half of it, and {whole:.2f} with all exits; got "
            f"max_cost={max_cost}."
        )
    curve = sweep_rule(trace, rule, exits=exits, answer=answer)
    if max_cost is not None:
        chosen = curve.best_within(max_cost)
        demand = f"a cost of at most {max_cost}: the cheapest threshold costs {curve.cost.min():.4f}"
    elif min_agreement is not None:
        chosen = curve.cheapest_above(min_agreement)
        demand = f"an agreement of at least {min_agreement}: the best threshold reaches {curve.accuracy.max():.4f}"
    else:
        assert max_accuracy_drop is not None
        floor = reference_accuracy(trace, reference, original) - max_accuracy_drop
        chosen = curve.cheapest_above(floor)
        demand = f"an accuracy of at least {floor:.4f}: the best threshold reaches {curve.accuracy.max():.4f}"
    if chosen is None:
        raise CalibrationError(f"no {rule} threshold has {demand}.")
    return curve.policy(curve.thresholds[chosen].item())


def refuse_test(trace: Trace) -> None:
    """Raise a CalibrationError where a threshold would be chosen on the test split."""
    if trace.info.split == "test":
        raise CalibrationError("a threshold is not chosen on the test split: pass the validation Trace.")


def sweep_rule(trace: Trace, rule: str, *, exits: tuple[int, ...] | None = None, answer: str = "last") -> Curve:
    """Accuracy and cost of a rule at every threshold that makes a difference.

    Raises:
        UnknownName: there is no such rule.
        ConfigError: the rule has no such answer.
    """
    if rule == "confidence":
        return sweep_confidence(trace, exits=exits, answer=answer)
    if rule == "patience":
        if answer != "last":
            raise ConfigError(f"patience answers with the exit it stops at; answer={answer!r} is for confidence.")
        most = trace.num_exits if exits is None else len(exits) + 1
        return sweep(trace, lambda patience: Patience(int(patience), exits), map(float, range(most)))
    raise UnknownName("rule", rule, FAMILIES)


def reference_accuracy(trace: Trace, reference: str, original: Trace | None) -> float:
    """Accuracy that a drop is measured from; see ``calibrate``."""
    if reference == "last" or (original is None and trace.info.strategy == "ic_only"):
        return trace.correct[:, -1].double().mean().item()
    if original is None:
        raise CalibrationError(
            "the original network's accuracy is not in this Trace: pass original=, its Trace of the same samples."
        )
    try:
        same_samples(original, trace)
    except TraceError as error:
        raise CalibrationError(f"the original network's Trace does not fit: {error}") from None
    return original.correct[:, -1].double().mean().item()
