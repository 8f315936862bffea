"""What the page says of a network with internal exits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shallowdeep.analysis.backdoor import BackdoorEffect, measure_backdoor
from shallowdeep.analysis.budgets import Budgets, measure_budgets
from shallowdeep.analysis.overthinking import Overthinking, measure_overthinking
from shallowdeep.errors import FileFormatError, TraceError
from shallowdeep.policies.replay import Curve, Decisions, oracle, replay, sweep_confidence
from shallowdeep.policies.rules import Confidence, ExitPolicy
from shallowdeep.report.drawing import Drawing, draw
from shallowdeep.report.flows import Flows, measure_flows
from shallowdeep.report.gallery import ClassLine, Gallery, by_class, class_names, images_of, make_galleries
from shallowdeep.report.missing import Missing, attempt
from shallowdeep.report.operating import OtherPolicy, Start, find_start, policy_of
from shallowdeep.report.saliency import View, make_views
from shallowdeep.report.samples import PackedSamples, pack
from shallowdeep.report.suspicion import Suspicion, measure_suspicion
from shallowdeep.runs.run import Run
from shallowdeep.storage import load_tensors, read_json
from shallowdeep.traces.trace import Trace

MAX_FLOW_COLUMNS = 9
Galleries = tuple[tuple[Gallery, ...], tuple[Gallery, ...]]
Views = dict[int, tuple[View, View]]


@dataclass(frozen=True)
class ExitLine:
    """One exit of a network; shares in [0, 1].

    Attributes:
        number: from 0; the last is the network's own output.
        name: as the page calls it.
        tap: the layer it reads; empty where the folder does not say.
        depth: FLOPs of the backbone up to it, of all of the backbone's.
        cost: of leaving there, earlier exits included.
        alone: cost of a smaller network that ends there and has no other exits.
        accuracy: over all samples (agreement with the last exit, where there are no labels).
    """

    number: int
    name: str
    tap: str
    depth: float
    cost: float
    alone: float
    accuracy: float


@dataclass(frozen=True)
class EarlyExits:
    """What there is to say of a network with internal exits.

    Attributes:
        exits: shallow to deep.
        drawing: of the network.
        start: where the threshold slider stands at first.
        policy: the run's own.
        other: the same with what it does, where that has no threshold.
        samples: for the browser.
        curve: at every threshold that makes a difference.
        oracle: leaving at the first right exit; without labels that says nothing, and is ``Missing``.
        budgets: thresholds from validation data.
        overthinking: wasteful and destructive.
        flows: who is right where, at every exit.
        bands: the same at so many exits as a diagram can show.
        confusion: that and confidence as alarms.
        classes: overthinking by class.
        galleries: images by first right exit, and of destructive overthinking.
        saliency: what the first and the last exit looked at, by the row of a sample that overthinking destroyed.
        backdoor: clean against triggered samples; ``None``: the run is about no backdoor.
        wanted: name of the class that the backdoor wants; empty where there is nothing to show of one.
        speed: rows of the run's benchmark; ``None``: it has none.
    """

    exits: tuple[ExitLine, ...]
    drawing: Drawing
    start: Start
    policy: ExitPolicy | Missing
    other: OtherPolicy | None
    samples: PackedSamples
    curve: Curve
    oracle: Decisions | Missing
    budgets: Budgets | Missing
    overthinking: Overthinking | Missing
    flows: Flows | Missing
    bands: Flows | Missing
    confusion: Suspicion | Missing
    classes: tuple[ClassLine, ...] | Missing
    galleries: Galleries | Missing
    saliency: Views | Missing
    backdoor: BackdoorEffect | Missing | None
    wanted: str
    speed: tuple[dict[str, Any], ...] | Missing | None


def look_at_exits(run: Run, test: Trace, *, labelled: bool, galleries: bool) -> EarlyExits:
    """Everything a run's Traces say of its exits.

    Args:
        run: what has a policy, a configuration, perhaps a benchmark and data at hand.
        test: what is reported, with internal exits; without labels, with the last exit's answers for them.
        labelled: whether its labels are true ones.
        galleries: show images.

    Raises:
        TraceError: the exits have several label sets, or differ in width.
    """
    val, train = (attempt(lambda split=split: run.trace(split)) for split in ("val", "train"))
    policy, source = policy_of(run)
    budgets = attempt(lambda: _budgets(val, test, labelled=labelled))
    start = find_start(test, policy, source, budgets)
    unlabelled = Missing("This needs labels, and the recorded test split has none.")
    other = None if isinstance(policy, Missing | Confidence) else OtherPolicy(policy, replay(test, policy))
    pictures, views = _pictures(run, test, wanted=galleries) if labelled else (unlabelled, unlabelled)
    backdoor = _backdoor(run, test, train, policy) if labelled else None
    return EarlyExits(
        exits=_exit_lines(run, test),
        drawing=draw(_depths(test)),
        start=start,
        policy=policy,
        other=other,
        samples=pack(test, start.policy),
        curve=sweep_confidence(test, exits=start.policy.exits, answer=start.policy.answer),
        oracle=oracle(test) if labelled else unlabelled,
        budgets=budgets,
        overthinking=measure_overthinking(test) if labelled else unlabelled,
        flows=measure_flows(test) if labelled else unlabelled,
        bands=measure_flows(test, _flow_columns(test.num_exits)) if labelled else unlabelled,
        confusion=attempt(lambda: measure_suspicion(test, _there(train))) if labelled else unlabelled,
        classes=by_class(test) if labelled else unlabelled,
        galleries=pictures,
        saliency=views,
        backdoor=backdoor,
        wanted=class_names(test)[backdoor.target] if isinstance(backdoor, BackdoorEffect) else "",
        speed=_speed(run),
    )


def _pictures(run: Run, test: Trace, *, wanted: bool) -> tuple[Galleries | Missing, Views | Missing]:
    """Galleries, and what exits looked at in those of overthinking."""
    if not wanted:
        hidden = Missing("Images were left out of this report on request.")
        return hidden, hidden
    images = attempt(lambda: images_of(run, test))
    if isinstance(images, Missing):
        return images, images
    pictures = attempt(lambda: make_galleries(images, test))
    if isinstance(pictures, Missing):
        return pictures, pictures
    return pictures, attempt(lambda: make_views(run, images, test, pictures[1]))


def _there(trace: Trace | Missing) -> Trace:
    if isinstance(trace, Missing):
        raise TraceError(trace.reason)
    return trace


def _budgets(val: Trace | Missing, test: Trace, *, labelled: bool) -> Budgets:
    chooser = _there(val)
    return measure_budgets(chooser if labelled else chooser.as_agreement(), test)


def _backdoor(
    run: Run, test: Trace, train: Trace | Missing, policy: ExitPolicy | Missing
) -> BackdoorEffect | Missing | None:
    attack = run.config.backdoor.build()
    if attack is None:
        return None
    return attempt(
        lambda: measure_backdoor(
            test,
            run.trace("triggered"),
            attack.target_in(class_names(test)),
            training=_there(train),
            policy=None if isinstance(policy, Missing) else policy,
        )
    )


def _speed(run: Run) -> tuple[dict[str, Any], ...] | Missing | None:
    paths = run.benchmarks
    return attempt(lambda: tuple(row for path in paths for row in _speed_rows(path))) if paths else None


def _speed_rows(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a benchmark that compare an engine with the same network without exits."""
    try:
        values = read_json(path)
        return tuple(
            {
                "back end": str(row["back end"]),
                "precision": str(row["precision"]),
                "device": str(row.get("device", values.get("device", "cpu"))),
                "batch": int(row["batch"]),
                "time": {name: float(row["of plain"][name]) for name in ("median", "low", "high")},
                "cost": float(row["cost"]),
                "accuracy": float(row["accuracy"]),
                "n": int(row["n"]),
            }
            for row in values["engines"]
            if row["of plain"] is not None
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} is no benchmark of this version ({error!r}). Make it anew.") from None


def _exit_lines(run: Run, test: Trace) -> tuple[ExitLine, ...]:
    last = test.num_exits - 1
    taps = _taps(run, last)
    costs = test.costs
    alone = [
        (backbone + head) / (costs.plain_flops or costs.backbone_flops[-1])
        for backbone, head in zip(costs.backbone_flops, costs.head_flops, strict=True)
    ]
    return tuple(
        ExitLine(
            exit, "last" if exit == last else f"exit {exit}", "output" if exit == last else taps[exit],
            depth, cost, alone[exit], accuracy,
        )
        for exit, (depth, cost, accuracy) in enumerate(
            zip(_depths(test), costs.relative().tolist(), test.correct.double().mean(0).tolist(), strict=True)
        )
    )  # fmt: skip


def _depths(test: Trace) -> list[float]:
    return [flops / test.costs.backbone_flops[-1] for flops in test.costs.backbone_flops]


def _taps(run: Run, number: int) -> list[str]:
    """Names of the layers that exits read; empty ones where the folder has no network."""
    found = attempt(lambda: load_tensors(run.weights, kind="sdn")[1])
    try:
        names = [] if isinstance(found, Missing) else [str(p["site"]["name"]) for p in found["placements"]]
    except (KeyError, TypeError):
        names = []
    return names if len(names) == number else [""] * number


def _flow_columns(num_exits: int) -> tuple[int, ...]:
    """All exits, or so many of them, evenly, that a diagram can show them."""
    count = min(num_exits, MAX_FLOW_COLUMNS)
    return tuple(torch.linspace(0, num_exits - 1, count, dtype=torch.float64).round().long().tolist())
