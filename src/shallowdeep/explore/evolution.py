"""One image through the network: what each exit says the moment it says it, then what the whole tells."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from shallowdeep.analysis.confusion import confusion_scores
from shallowdeep.analysis.gradcam import gradcam
from shallowdeep.errors import ShallowDeepError
from shallowdeep.explore.setting import Setting, Usual
from shallowdeep.inference.answers import Answers
from shallowdeep.policies.replay import replay
from shallowdeep.report.gallery import png_url
from shallowdeep.report.missing import Missing
from shallowdeep.report.saliency import tinted
from shallowdeep.traces.trace import Trace

SHOWN = 512
"""Pixels of an image's longer side, at most."""
KEPT = 100
"""Classes of which an exit's score is told, the most likely ones."""


@dataclass(frozen=True)
class Begun:
    """What the network will see.

    Attributes:
        image: as a data URI.
        words: what the image is, and how it was made to fit.
        label: its true class, where that is known.
    """

    event: ClassVar[str] = "begun"
    image: str
    words: str
    label: int | None


@dataclass(frozen=True)
class Answered:
    """What one exit says.

    Attributes:
        exit: which.
        classes: the most likely ones, from the likeliest; that is its answer.
        scores: their probabilities; the first is its confidence.
        elapsed_ms: since the network was handed the image.
    """

    event: ClassVar[str] = "answered"
    exit: int
    classes: tuple[int, ...]
    scores: tuple[float, ...]
    elapsed_ms: float


@dataclass(frozen=True)
class Decided:
    """What the run's own policy does, where that is no confidence threshold.

    Attributes:
        exit: at which it leaves.
        label: that it answers.
        cost: as a share of the plain network.
    """

    event: ClassVar[str] = "decided"
    exit: int
    label: int
    cost: float


@dataclass(frozen=True)
class Confused:
    """How much the exits disagree with the last one.

    Attributes:
        distances: L1, of each exit's probabilities to the last one's.
        confusion: their sum.
        normalised: 0 is the mean on training data, 1 one spread above; ``None``: that is not known.
        right_above: share of the test split's right answers that are more confused; ``None``: not known.
        wrong_above: the same of its wrong answers.
    """

    event: ClassVar[str] = "confused"
    distances: tuple[float, ...]
    confusion: float
    normalised: float | None
    right_above: float | None
    wrong_above: float | None


@dataclass(frozen=True)
class Looked:
    """Where one exit looked for its answer.

    Attributes:
        exit: which.
        image: in grey, orange where it looked, as a data URI; ``None``: there is no such map.
        why_not: the reason.
    """

    event: ClassVar[str] = "looked"
    exit: int
    image: str | None
    why_not: str = ""


Event = Begun | Answered | Decided | Confused | Looked


def as_json(event: Event) -> dict[str, Any]:
    """As JSON-able values, with ``event``."""
    return {"event": event.event, **asdict(event)}


def evolve(
    setting: Setting, pixels: UInt8[Tensor, "c h w"], words: str = "", label: int | None = None
) -> Iterator[Event]:
    """Run the network on one image, to its end.

    The network is left as it was.

    Args:
        setting: whose network.
        pixels: as the network's preparation makes them.
        words: what the image is.
        label: its true class, where that is known.

    Yields:
        The image; each exit's answer as it is computed; the run's own policy, where that is no threshold; confusion,
        where there are internal exits; then what each exit looked at.
    """
    yield Begun(png_url(pixels, SHOWN), words, label)
    inputs = setting.preparation.inputs(pixels)
    scores: list[Float[Tensor, "1 outputs"]] = []
    begin = time.perf_counter()
    with closing(cast(Generator[Answers], setting.engine.anytime(inputs))) as answers:
        for exit, found in enumerate(answers):
            elapsed_ms = 1e3 * (time.perf_counter() - begin)
            order = np.argsort(-found.scores[0], kind="stable")[:KEPT]
            yield Answered(exit, tuple(order.tolist()), tuple(found.scores[0][order].tolist()), elapsed_ms)
            scores.append(torch.from_numpy(found.scores))
    trace = Trace.from_logits(scores, costs=setting.sdn.costs, probabilities=True)
    if setting.policy is not None:
        decisions = replay(trace, setting.policy)
        yield Decided(int(decisions.exits[0]), int(decisions.predictions[0]), decisions.cost)
    if trace.num_exits > 1:
        yield _confused(setting, trace, scores)
    for exit in range(trace.num_exits):
        yield _looked(setting, pixels, inputs, exit)


def _confused(setting: Setting, trace: Trace, scores: list[Tensor]) -> Confused:
    distances = tuple(float((one - scores[-1]).abs().sum()) for one in scores)
    confusion = float(confusion_scores(trace)[0])
    usual = setting.usual
    if not isinstance(usual, Usual):
        return Confused(distances, confusion, None, None, None)
    normalised = (confusion - usual.mean) / usual.spread
    test = setting.test
    if isinstance(test, Missing) or isinstance(usual.suspicion, Missing):
        return Confused(distances, confusion, normalised, None, None)
    above, right = setting.recorded_confusion > confusion, test.correct[:, -1]
    return Confused(
        distances,
        confusion,
        normalised,
        above[right].double().mean().item(),
        above[~right].double().mean().item(),
    )


def _looked(setting: Setting, pixels: Tensor, inputs: Tensor, exit: int) -> Looked:
    try:
        map = gradcam(setting.sdn, inputs, exit=exit).maps[0]
        return Looked(exit, png_url(tinted(pixels, map), SHOWN))
    except ShallowDeepError as error:
        return Looked(exit, None, str(error))
