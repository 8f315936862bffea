"""Whether an exported folder answers as the stages in PyTorch do that it was made of, and these as the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shallowdeep.errors import NetworkError
from shallowdeep.inference.answers import Answers
from shallowdeep.inference.onnx.convert import Converted
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.sessions import Settings
from shallowdeep.inference.runner.timing import made_up
from shallowdeep.inference.stages import EAGER, as_inputs, thresholds_of
from shallowdeep.inference.ties import nudged, with_numbers
from shallowdeep.networks.calls import evaluating, exact_float32
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import ExitPolicy
from shallowdeep.traces.trace import Trace

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order, through a hundred layers
SCORES = 1e-4
MEDIANS = 4  # exits whose median confidence is tried as a threshold
FAR = 1e6  # beyond every threshold


@dataclass(frozen=True)
class Parity:
    """How far an exported folder is from PyTorch's stages, on the example's rows.

    Attributes:
        rows: that were compared.
        settings: of the policy's numbers that were tried, so that rows leave at several exits.
        exits_used: at which of them rows left.
        logits: the largest difference of a logit, by share of the largest one; in int8 what rounding makes of it.
        scores: the largest difference of a score, by form.
        label_agreement: share of rows and exits with the same largest logit.
    """

    rows: int
    settings: int
    exits_used: tuple[int, ...]
    logits: float
    scores: dict[str, float]
    label_agreement: float

    def __str__(self) -> str:
        forms = ", ".join(f"{form} {difference:.1e}" for form, difference in self.scores.items())
        return (
            f"against PyTorch on {self.rows} rows, {self.settings} settings, exits {list(self.exits_used)}: logits "
            f"within {self.logits:.1e} of the largest; scores within {forms}"
        )


def check_folder(folder: Path, converted: Converted, policy: ExitPolicy, precision: str) -> Parity:
    """Compare all forms in a folder to PyTorch's stages, to each other, and the stages to the network itself.

    In int8 logits may differ from PyTorch's; the forms decide as the policy does on the int8 logits.

    Raises:
        NetworkError: they differ.
    """
    settings = Settings(threads=torch.get_num_threads())
    runners = {"stages": Runner(folder, settings=settings)}
    for form in ("single", "batched"):
        if runners["stages"].manifest[form] is not None:
            runners[form] = Runner(folder, form, settings=settings)
    inputs, exits = converted.inputs, runners["stages"].exits
    expected = _logits_in_torch(converted)
    _check_cut(converted, expected)
    found = runners["stages"].cascade.logits(inputs)
    apart, scale = _apart(found, expected)
    agreement = float(np.mean([a.argmax(-1) == b.argmax(-1) for a, b in zip(expected, found, strict=True)]))
    if precision == "fp32" and not apart <= TOLERANCE:
        raise NetworkError(
            f"the exported stages differ from PyTorch's: a logit by {apart:.1e} of the largest ({scale:.3g}), and "
            f"{TOLERANCE:.0e} is allowed. Nothing was written."
        )
    basis = expected if precision == "fp32" else found
    settings_tried = _settings(policy, basis, exits)
    used: set[int] = set()
    scores = dict.fromkeys(runners, 0.0)
    for numbers in settings_tried:
        wanted_exits, wanted_scores, firm = decide(policy, numbers, basis, exits)
        used.update(wanted_exits[firm].tolist())
        for form, one in runners.items():
            answers = one.with_thresholds(numbers)(inputs)
            scores[form] = max(scores[form], _compare(form, answers, wanted_exits, wanted_scores, firm))
    rows = len(next(iter(inputs.values())))
    return Parity(rows, len(settings_tried), tuple(sorted(used)), apart, scores, agreement)


def extremes_of(folder: Path, policy: ExitPolicy) -> dict[str, dict[str, float | int]] | None:
    """Thresholds by which everyone leaves at the first exit (``"early"``), and by which nobody does (``"late"``)."""
    runner = Runner(folder, settings=Settings(threads=torch.get_num_threads()))
    values = made_up(runner.manifest, 4)
    names = thresholds_of(policy)
    found: dict[str, dict[str, float | int]] = {}
    for number in (0, FAR, -FAR):
        thresholds = {name: type(value)(number) for name, value in names.items()}
        left = runner.with_thresholds(thresholds)(values).exits
        if (left == runner.exits[0]).all():
            found.setdefault("early", thresholds)
        if (left == runner.exits[-1]).all():
            found.setdefault("late", thresholds)
    return found if len(found) == 2 and len(runner.exits) > 1 else None


def _apart(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> tuple[float, float]:
    """The largest difference of a logit, by share of the largest one or of 1, and that."""
    scale = max(1.0, max(float(np.abs(one).max()) for one in expected))
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) / scale, scale


def _check_cut(converted: Converted, found: Sequence[np.ndarray]) -> None:
    """Compare the stages' logits to those of the network that they were cut from."""
    with evaluating(converted.sdn), exact_float32():
        logits = converted.sdn(as_inputs(converted.reference, converted.like))
    apart, scale = _apart(found, [logits[module.exit].numpy() for module in converted.modules])
    if not apart <= TOLERANCE:
        raise NetworkError(
            f"the stages differ from the network that they were cut from: a logit by {apart:.1e} of the largest "
            f"({scale:.3g}), and {TOLERANCE:.0e} is allowed. Nothing was written. {EAGER}"
        )


def _logits_in_torch(converted: Converted) -> list[np.ndarray]:
    values = dict(converted.reference)
    found = []
    with torch.inference_mode(), exact_float32():
        for module in converted.modules:
            numbers = [torch.tensor(number) for number in thresholds_of(module._policy).values()]
            *given, _, _, logits = module(*(values[name] for name in module.inputs), *numbers)
            values.update(zip(module.outputs, given, strict=True))
            found.append(logits.numpy())
    return found


def decide(
    policy: ExitPolicy, numbers: Mapping[str, float | int], logits: Sequence[np.ndarray], exits: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a policy with other numbers makes of logits.

    Returns:
        Where each row leaves, the scores it is answered with, and whether that is no tie.
    """
    trace = _as_trace(logits, exits)
    found = replay(trace, with_numbers(policy, numbers))
    firm = torch.ones(len(trace), dtype=torch.bool)
    for moved in nudged(numbers):
        firm &= replay(trace, with_numbers(policy, moved)).exits == found.exits
    return found.exits.numpy(), found.scores.numpy(), firm.numpy()


def _as_trace(logits: Sequence[np.ndarray], exits: Sequence[int]) -> Trace:
    """Logits at a policy's exits as a Trace of the whole network; nobody looks at the exits between, nor at costs."""
    known = dict(zip(exits, logits, strict=True))
    every = range(exits[-1] + 1)
    return Trace.from_logits([known.get(exit, logits[-1]) for exit in every], costs=[exit + 1 for exit in every])


def _settings(policy: ExitPolicy, logits: Sequence[np.ndarray], exits: Sequence[int]) -> list[dict[str, float | int]]:
    """The policy's own numbers, and others by which rows should leave at several exits."""
    own: dict[str, float | int] = dict(thresholds_of(policy))
    tried = [own]
    for name, value in own.items():
        if isinstance(value, float):
            sure = [torch.from_numpy(one).softmax(-1).amax(-1).median().item() for one in logits[:-1][:MEDIANS]]
            others: list[Any] = [0.0, *sure, FAR]
        else:
            others = [*range(min(len(exits), 4)), int(FAR)]
        tried += [{**own, name: other} for other in others]
    return tried


def _compare(form: str, answers: Answers, exits: np.ndarray, scores: np.ndarray, firm: np.ndarray) -> float:
    wrong = np.flatnonzero(firm & (answers.exits != exits))
    if len(wrong):
        row = wrong[0]
        raise NetworkError(
            f"the exported {form} lets row {row} leave at exit {answers.exits[row]}, PyTorch at {exits[row]} "
            f"({len(wrong)} of {len(exits)} rows). Nothing was written."
        )
    apart = float(np.abs(answers.scores - scores)[firm].max(initial=0.0))
    if not apart <= SCORES:
        raise NetworkError(
            f"the exported {form} answers with other scores than PyTorch: {apart:.1e} apart, {SCORES:.0e} is allowed. "
            "Nothing was written."
        )
    return apart
