"""The referees: every vectorised answer again, in plain Python, one sample and one exit at a time.

Also builders of small Traces. A rule's referee takes one sample's logits, a row per exit shown to it, and gives
the place among those exits at which the sample leaves, with the scores it is answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import jaxtyping
import torch
from hypothesis import strategies as st
from torch import Tensor

from shallowdeep.networks.costs import Costs
from shallowdeep.traces.trace import Trace, TraceInfo

Rule = Callable[[Sequence[Tensor]], tuple[int, list[float]]]


# Traces


def make_costs(num_exits: int, *, head: int = 7, nominal: bool = True) -> Costs:
    """100 FLOPs to each next exit; every internal classifier adds its own."""
    shares = tuple((i + 1) / num_exits for i in range(num_exits))
    return Costs(
        backbone_flops=tuple(100 * (i + 1) for i in range(num_exits)),
        head_flops=(*(head + i for i in range(num_exits - 1)), 0),
        backbone_params=tuple(10 * (i + 1) for i in range(num_exits)),
        head_params=(*(3 for _ in range(num_exits - 1)), 0),
        nominal=shares if nominal else None,
    )


def make_trace(
    n: int,
    num_exits: int = 4,
    num_classes: int = 5,
    seed: int = 0,
    *,
    split: str = "val",
    strategy: str = "",
    noise: float = 1.0,
) -> Trace:
    """A Trace whose exits get better with depth, with some samples that deeper exits get wrong again."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=random)
    truth = torch.nn.functional.one_hot(labels, num_classes)
    strengths = [3.0 * (exit + 1) / num_exits for exit in range(num_exits)]
    logits = tuple(strength * truth + noise * torch.randn(n, num_classes, generator=random) for strength in strengths)
    info = TraceInfo(split=split, strategy=strategy)
    return Trace(logits, labels, 3 * torch.arange(n) + 1, make_costs(num_exits), info)


def hand_trace(*, split: str = "val", strategy: str = "") -> Trace:
    """Four samples, three exits and two classes, small enough to work everything out on paper.

    ======  =====  =========================  ================  =========
    sample  label  probability of class 1     right             confusion
    ======  =====  =========================  ================  =========
    0       0      0.10  0.25  0.30           yes   yes   yes   0.5
    1       1      0.40  0.75  0.90           no    yes   yes   1.3
    2       1      0.65  0.30  0.45           yes   no    no    0.7
    3       0      0.85  0.55  0.60           no    no    no    0.6
    ======  =====  =========================  ================  =========

    Leaving at the exits costs 0.5, 0.85 and 1.15; without heads 0.4, 0.7 and 1.
    """
    ones = torch.tensor([[0.10, 0.40, 0.65, 0.85], [0.25, 0.75, 0.30, 0.55], [0.30, 0.90, 0.45, 0.60]])
    logits = torch.stack([1 - ones, ones], dim=-1).log()
    costs = Costs((40, 70, 100), (10, 5, 0), (1, 2, 3), (1, 1, 0), nominal=(0.25, 0.5, 1.0))
    labels, ids = torch.tensor([0, 1, 1, 0]), torch.tensor([7, 3, 11, 2])
    return Trace(tuple(logits), labels, ids, costs, TraceInfo(split=split, strategy=strategy))


FEW_LOGITS = (0.0, 1.0, 2.0, 40.0)
"""Few values make many ties; beside 40 the others vanish, so that confidences are exactly 1."""


@st.composite
def traces(draw: st.DrawFn, *, max_n: int = 6, max_exits: int = 4, max_classes: int = 3, split: str = "val") -> Trace:
    """Small Traces full of ties: logits drawn from a few values, down to one sample, exit or class."""
    n, num_exits = draw(st.integers(1, max_n)), draw(st.integers(1, max_exits))
    num_classes = draw(st.integers(1, max_classes))
    size = n * num_exits * num_classes
    values = draw(st.lists(st.sampled_from(FEW_LOGITS), min_size=size, max_size=size))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=n, max_size=n))
    logits = torch.tensor(values).reshape(num_exits, n, num_classes)
    head = draw(st.integers(0, 20))
    with _unchecked():
        costs = make_costs(num_exits, head=head)
        return Trace(tuple(logits), torch.tensor(labels), torch.arange(n), costs, TraceInfo(split=split))


@contextmanager
def _unchecked() -> Iterator[None]:
    """No run-time type checks: beartype picks what it checks at random, which Hypothesis refuses in a strategy."""
    before, jaxtyping.config.jaxtyping_disable = jaxtyping.config.jaxtyping_disable, True
    try:
        yield
    finally:
        jaxtyping.config.jaxtyping_disable = before


def subsets(num_exits: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """Internal exits to look at, in order; all of them as ``None``."""
    chosen = st.sets(st.sampled_from(range(num_exits - 1))) if num_exits > 1 else st.just(set())
    return st.none() | chosen.map(lambda exits: tuple(sorted(exits)))


# Rules


def confidence_exit(threshold: float, answer: str = "last") -> Rule:
    """Leave at the first exit as sure as the threshold; answers compared in float32, as a Trace has them."""
    threshold = torch.tensor(threshold, dtype=torch.float32).item()

    def decide(logits: Sequence[Tensor]) -> tuple[int, list[float]]:
        met = [row.softmax(-1).tolist() for row in logits]
        for place, scores in enumerate(met):
            if max(scores) >= threshold:
                return place, scores
        last = len(met) - 1
        if answer == "last":
            return last, met[last]
        surest = met[0]
        for scores in met:
            if max(scores) > max(surest):
                surest = scores
        return last, surest

    return decide


def patience_exit(patience: int) -> Rule:
    """Leave once that many exits in a row have given the same class as the exit before them."""

    def decide(logits: Sequence[Tensor]) -> tuple[int, list[float]]:
        classes = [_argmax(row.tolist()) for row in logits]
        for place in range(len(classes)):
            repeats = 0
            while repeats < place and classes[place - repeats - 1] == classes[place]:
                repeats += 1
            if repeats >= patience:
                return place, logits[place].softmax(-1).tolist()
        return len(classes) - 1, logits[-1].softmax(-1).tolist()

    return decide


# Replay, cost and the choice of a threshold


class Decision(NamedTuple):
    exit: int
    scores: list[float]
    cost: float


def cost_of(costs: Costs, exit: int, enabled: Sequence[int]) -> float:
    """Share of the plain backbone's FLOPs that leaving at an exit takes, enabled heads on the way included."""
    flops = costs.backbone_flops[exit]
    for head in range(exit + 1):
        if head in enabled:
            flops += costs.head_flops[head]
    return flops / costs.backbone_flops[-1]


def decide(trace: Trace, rule: Rule, exits: Sequence[int] | None = None) -> list[Decision]:
    """What a rule does with each sample, shown only some internal exits and the last."""
    last = trace.num_exits - 1
    shown = [*(range(last) if exits is None else exits), last]
    decisions = []
    for i in range(len(trace)):
        place, scores = rule([trace.logits[exit][i] for exit in shown])
        decisions.append(Decision(shown[place], scores, cost_of(trace.costs, shown[place], shown)))
    return decisions


def accuracy_and_cost(trace: Trace, decisions: Sequence[Decision]) -> tuple[float, float]:
    """Share of right answers, and mean cost."""
    right = sum(_argmax(d.scores) == label for d, label in zip(decisions, trace.true_labels.tolist(), strict=True))
    return right / len(decisions), math.fsum(d.cost for d in decisions) / len(decisions)


class Choice(NamedTuple):
    exits: tuple[int, ...]
    accuracy: float
    cost: float


def every_confidence_choice(trace: Trace, exits: Sequence[int] | None = None, answer: str = "last") -> list[Choice]:
    """All that a confidence threshold can do: tried at every confidence there is, between them and beyond."""
    met = {0.0, 2.0}
    for logits in trace.logits:
        for row in logits:
            met.add(max(row.softmax(-1).tolist()))
    levels = sorted(met)
    middles = [(low + high) / 2 for low, high in pairwise(levels)]
    return [_choice(trace, confidence_exit(level, answer), exits) for level in sorted([*levels, *middles])]


def every_patience_choice(trace: Trace, exits: Sequence[int] | None = None) -> list[Choice]:
    """All that a patience can do, the first exit for everyone and the last for everyone included."""
    return [_choice(trace, patience_exit(patience), exits) for patience in range(trace.num_exits + 1)]


def best_within(choices: Sequence[Choice], max_cost: float) -> tuple[float, float] | None:
    """The budget rule: highest accuracy of those within the budget, of equals the lowest cost."""
    best = None
    for choice in choices:
        better = best is None or choice.accuracy > best[0] or (choice.accuracy == best[0] and choice.cost < best[1])
        if choice.cost <= max_cost + 1e-9 and better:  # a sum in another order rounds otherwise
            best = choice.accuracy, choice.cost
    return best


def cheapest_above(choices: Sequence[Choice], min_accuracy: float) -> tuple[float, float] | None:
    """The drop rule: lowest cost of those accurate enough, of equals the highest accuracy."""
    best = None
    for choice in choices:
        better = best is None or choice.cost < best[1] or (choice.cost == best[1] and choice.accuracy > best[0])
        if choice.accuracy >= min_accuracy - 1e-9 and better:
            best = choice.accuracy, choice.cost
    return best


def _choice(trace: Trace, rule: Rule, exits: Sequence[int] | None) -> Choice:
    decisions = decide(trace, rule, exits)
    return Choice(tuple(d.exit for d in decisions), *accuracy_and_cost(trace, decisions))


# Overthinking


def overthinking(trace: Trace) -> dict[str, object]:
    """Every field of the analysis of the same name."""
    n, last = len(trace), trace.num_exits - 1
    right = [
        [_argmax(trace.logits[exit][i].tolist()) == int(trace.true_labels[i]) for exit in range(last + 1)]
        for i in range(n)
    ]
    wrong_at_end = [i for i in range(n) if not right[i][last]]
    known_before = [i for i in range(n) if any(right[i][:last])]
    nominal = trace.costs.nominal
    everyone = list(range(last + 1))
    oracle_cost = nominal_cost = 0.0
    for i in range(n):
        first = right[i].index(True) if True in right[i] else last
        oracle_cost += cost_of(trace.costs, first, everyone)
        nominal_cost += 1.0 if nominal is None or first == last else nominal[first]
    destroyed = [i for i in known_before if i in wrong_at_end]
    return {
        "n": n,
        "accuracy": [_share(right[i][exit] for i in range(n)) for exit in everyone],
        "cumulative": [_share(any(right[i][: exit + 1]) for i in range(n)) for exit in everyone],
        "first_correct": [_share(right[i][exit] and not any(right[i][:exit]) for i in range(n)) for exit in everyone],
        "wasteful": len(known_before) / n,
        "wasteful_and_right": (len(known_before) - len(destroyed)) / n,
        "destructive": len(destroyed) / n,
        "destructive_of_errors": len(destroyed) / len(wrong_at_end) if wrong_at_end else 0.0,
        "destructive_at": [_share(right[i][exit] and not right[i][last] for i in range(n)) for exit in everyone],
        "oracle_cost": oracle_cost / n,
        "oracle_cost_nominal": None if nominal is None else nominal_cost / n,
    }


# Confusion


def confusion_score(trace: Trace, sample: int) -> float:
    """Summed L1 distance between one sample's last softmax and every exit's, its own (0) included."""
    last = trace.logits[-1][sample].softmax(-1).tolist()
    total = 0.0
    for logits in trace.logits:
        total += sum(abs(a - b) for a, b in zip(logits[sample].softmax(-1).tolist(), last, strict=True))
    return total


def normalised(scores: Sequence[float], training: Sequence[float]) -> list[float]:
    """Scores less the training split's mean, in units of its population spread."""
    mean = math.fsum(training) / len(training)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in training) / len(training))
    return [(score - mean) / spread for score in scores]


def share_beyond(scores: Sequence[float], others: Sequence[float], *, above: bool) -> float:
    """Share of scores above (or below) the mean of others."""
    mean = math.fsum(others) / len(others)
    return _share(score > mean if above else score < mean for score in scores)


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Share of pairs, a positive and a negative, in which the positive scores higher; a tie is half a pair."""
    won = pairs = 0.0
    for score, is_positive in zip(scores, positive, strict=True):
        for other, other_positive in zip(scores, positive, strict=True):
            if is_positive and not other_positive:
                pairs += 1
                won += 1.0 if score > other else 0.5 if score == other else 0.0
    return won / pairs


def _argmax(values: Sequence[float]) -> int:
    best = 0
    for i, value in enumerate(values):
        if value > values[best]:
            best = i
    return best


def _share(truths) -> float:
    truths = list(truths)
    return sum(truths) / len(truths)
