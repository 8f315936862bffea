"""Everything that a page about one run needs: network, exits, threshold, usual confusion, images to pick."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from shallowdeep.analysis.budgets import measure_budgets
from shallowdeep.analysis.confusion import confusion_scores, usual_confusion
from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.images import ImageSet
from shallowdeep.data.samples import Splits
from shallowdeep.data.text import TEXTS
from shallowdeep.errors import ConfigError, DataError, MissingExtra, ShallowDeepError, TraceError
from shallowdeep.explore.preparation import Preparation, prepare_without_data
from shallowdeep.explore.shelf import Shelf, check_recorded, group
from shallowdeep.inference.engine import Engine
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence, ExitPolicy, exits_of
from shallowdeep.report.missing import Missing, attempt
from shallowdeep.report.operating import NOBODY, find_start, policy_of
from shallowdeep.report.suspicion import Suspicion, measure_suspicion
from shallowdeep.runs.run import Run
from shallowdeep.traces.trace import Trace


@dataclass(frozen=True)
class ExitLine:
    """One exit, as the page shows it before anything was computed.

    Attributes:
        name: as the page calls it.
        tap: the layer it reads.
        depth: FLOPs of the backbone up to it, of all of the backbone's.
        cost: of leaving there, the earlier exits that the policy looks at included, as a share of the plain network;
            ``None``: the policy does not look at it.
        accuracy: on the recorded test split; ``None``: not recorded, or without labels.
    """

    name: str
    tap: str
    depth: float
    cost: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Usual:
    """What confusion is measured against.

    Attributes:
        mean: on the training split.
        spread: likewise.
        suspicion: how it spreads over right and wrong answers of the test split.
    """

    mean: float
    spread: float
    suspicion: Suspicion | Missing


@dataclass(frozen=True)
class Setting:
    """What the page is about.

    Attributes:
        run: whose network answers.
        sdn: that network, on the device it runs on.
        engine: runs it to the end, whatever the threshold.
        preparation: of images.
        class_names: of the outputs.
        exits: shallow to deep.
        slider: whose threshold the slider starts at; its exits and answer hold at every threshold.
        source: who chose that threshold.
        policy: the run's own, where that has no confidence threshold.
        usual: what confusion is measured against.
        test: what was recorded of the test split.
        shelf: test images to pick.
    """

    run: Run
    sdn: ShallowDeepNetwork
    engine: Engine
    preparation: Preparation
    class_names: tuple[str, ...]
    exits: tuple[ExitLine, ...]
    slider: Confidence
    source: str
    policy: ExitPolicy | None
    usual: Usual | Missing
    test: Trace | Missing
    shelf: Shelf | Missing

    @cached_property
    def recorded_confusion(self) -> Float[Tensor, " n"]:
        """Confusion of each recorded test sample; a TraceError where there are none."""
        return confusion_scores(_there(self.test))

    @property
    def notes(self) -> tuple[str, ...]:
        """What cannot be shown, and how to get it."""
        parts = {"no images of the test split to pick": self.shelf, "nothing of the recorded test split": self.test}
        if self.sdn.num_exits > 1:
            parts["confusion without its usual size"] = self.usual
        if isinstance(self.usual, Usual) and not isinstance(self.test, Missing):
            parts["no confusion of right and wrong answers"] = self.usual.suspicion
        return tuple(f"{what}: {part.reason}" for what, part in parts.items() if isinstance(part, Missing))


def open_setting(run: Run) -> Setting:
    """Load what a page about a run needs; what is not there is left out, with the reason.

    Raises:
        ConfigError: the run is about text.
        FileFormatError: the run has no network, or it is damaged.
        DataError: the data are not at hand, and nothing else says how images are prepared; or they are no images.
    """
    if run.config.data in TEXTS:
        raise ConfigError(f"explore shows images, and {run.config.data} is text. Look at shallowdeep report instead.")
    sdn = run.load()
    if torch.cuda.is_available() and run.config.device != "cpu":
        sdn.to("cuda")
    data = attempt(lambda: run.load_data(sdn.backbone))
    preparation = _preparation(run, sdn, data)
    test = attempt(lambda: _of_this(sdn, run.trace("test")))
    samples = attempt(lambda: _test_images(data))
    if not isinstance(test, Missing) and not isinstance(samples, Missing):
        recorded = test
        test = attempt(lambda: check_recorded(samples, recorded))
    policy, source = policy_of(run)
    slider, source = _find_slider(run, test, policy, source)
    own = None if isinstance(policy, Missing | Confidence) else policy
    names = _class_names(sdn, data, test)
    return Setting(
        run=run,
        sdn=sdn,
        engine=Engine(sdn, Confidence(2.0)).prepare(preparation.inputs(preparation.blank)),
        preparation=preparation,
        class_names=names,
        exits=_exit_lines(sdn, own or slider, test),
        slider=slider,
        source=source,
        policy=own,
        usual=attempt(lambda: _usual(run, sdn, test)),
        test=test,
        shelf=samples if isinstance(samples, Missing) else _shelf(samples, test, own or slider, names),
    )


def _preparation(run: Run, sdn: ShallowDeepNetwork, data: Splits | Missing) -> Preparation:
    if isinstance(data, Missing):
        try:
            return prepare_without_data(run, sdn.backbone)
        except MissingExtra:
            raise
        except ShallowDeepError as error:
            raise DataError(f"{data.reason} Without the data nothing says how images are prepared: {error}") from None
    samples = data.test or data.train
    if not isinstance(samples, ImageSet | EncodedImages):
        raise DataError(f"explore shows images, and {run.config.data} holds none.")
    return Preparation.of(samples)


def _test_images(data: Splits | Missing) -> ImageSet | EncodedImages:
    if isinstance(data, Missing):
        raise DataError(data.reason)
    found = data.split("test")
    assert isinstance(found, ImageSet | EncodedImages)  # its kind is that of what the preparation was taken from
    return found


def _of_this(sdn: ShallowDeepNetwork, trace: Trace) -> Trace:
    if trace.costs != sdn.costs:
        raise TraceError("it was recorded of another network. Record it anew: shallowdeep record")
    return trace


def _find_slider(run: Run, test: Trace | Missing, policy: ExitPolicy | Missing, source: str) -> tuple[Confidence, str]:
    """The run's own threshold; else as the report finds one; else one at which nobody leaves early."""
    if isinstance(policy, Confidence):
        return policy, source
    if isinstance(test, Missing) or test.num_exits == 1:
        return Confidence(NOBODY), "No threshold was chosen for this run: everyone goes on to the end."
    judged = test if test.labels is not None else test.as_agreement()

    def budgets():
        val = run.trace("val")
        return measure_budgets(val if val.labels is not None else val.as_agreement(), judged)

    start = find_start(judged, policy, source, attempt(budgets))
    return start.policy, start.source


def _class_names(sdn: ShallowDeepNetwork, data: Splits | Missing, test: Trace | Missing) -> tuple[str, ...]:
    for names in (
        () if isinstance(data, Missing) else data.class_names,
        () if isinstance(test, Missing) else test.info.class_names,
    ):
        if len(names) == sdn.num_outputs:
            return tuple(names)
    return tuple(str(number) for number in range(sdn.num_outputs))


def _exit_lines(sdn: ShallowDeepNetwork, policy: ExitPolicy, test: Trace | Missing) -> tuple[ExitLine, ...]:
    used, last = exits_of(policy, sdn.num_exits), sdn.num_exits - 1
    costs = dict(zip(used, sdn.costs.relative(used[:-1])[used].tolist(), strict=True))
    accuracy = [None] * (last + 1)
    if isinstance(test, Trace) and test.labels is not None:
        accuracy = test.correct.double().mean(0).tolist()
    flops = sdn.costs.backbone_flops
    taps = (*sdn.taps, "output")
    return tuple(
        ExitLine("last" if exit == last else f"exit {exit}", taps[exit], flops[exit] / flops[-1],
                 costs.get(exit), accuracy[exit])
        for exit in range(last + 1)
    )  # fmt: skip


def _usual(run: Run, sdn: ShallowDeepNetwork, test: Trace | Missing) -> Usual:
    training = _of_this(sdn, run.trace("train"))
    mean, spread = usual_confusion(training)

    return Usual(mean, spread, attempt(lambda: measure_suspicion(_there(test), training)))


def _there(trace: Trace | Missing) -> Trace:
    if isinstance(trace, Missing):
        raise TraceError(trace.reason)
    return trace


def _shelf(
    samples: ImageSet | EncodedImages, test: Trace | Missing, policy: ExitPolicy, names: tuple[str, ...]
) -> Shelf:
    recorded = None if isinstance(test, Missing) else test
    return Shelf(samples, group(samples, recorded, None if recorded is None else replay(recorded, policy)), names)
