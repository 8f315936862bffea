"""Early exits against not exiting, on the clock: every way to run a network is timed in turn on the same samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.pytrees import row_counts, take_rows
from shallowdeep.data.samples import Batch, IndexedSamples, Samples
from shallowdeep.errors import ConfigError, TraceError, UnknownName, require
from shallowdeep.inference.backends import BACKENDS, PRECISIONS
from shallowdeep.inference.stages import thresholds_of
from shallowdeep.inference.ties import TIE, nudged, with_numbers
from shallowdeep.inference.timing.lanes import Lane, Workshop
from shallowdeep.inference.timing.rounds import Tally, time_in_turn
from shallowdeep.inference.timing.speed import EXITS, IN_PARTS, ONE_AT_A_TIME, PLAIN, WHOLE_BATCH, SpeedReport, Timing
from shallowdeep.networks.costs import Costs
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import ExitPolicy
from shallowdeep.processes import num_threads
from shallowdeep.progress import bar
from shallowdeep.traces.record import record
from shallowdeep.traces.trace import Trace

DEFAULT_BACKENDS = tuple(name for name in BACKENDS if name != "plain")
VERSIONS = {"onnx": "onnxruntime", "openvino": "openvino"}


def measure_speed(
    sdn: ShallowDeepNetwork,
    policy: ExitPolicy | Mapping[str, ExitPolicy],
    images: Any,
    labels: Int[Tensor, " n"],
    *,
    batch_sizes: Sequence[int] = (1, 8, 32, 256),
    backends: Sequence[str] = DEFAULT_BACKENDS,
    precisions: Sequence[str] = ("fp32",),
    rounds: int = 10,
    num_samples: int | None = None,
    threads: int | None = None,
    smaller: bool = True,
    trace: Trace | None = None,
    calibration: Any = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = False,
) -> SpeedReport:
    """Time early exits against the same network without them, and against what else one might run.

    In every round everything is timed once, one after another, on the same samples; which comes first changes from
    round to round. Ratios within a round are what counts. ``VARIANTS`` in ``speed`` says what is timed.

    Args:
        sdn: trained, on the device to be timed on. Not changed.
        policy: when to stop; a mapping gives each precision its own, calibrated on a Trace of that precision.
        images: what the backbone takes, samples as rows: a tensor, or a tuple or mapping of tensors.
        labels: true classes.
        batch_sizes: samples come in batches of each of these, one batch after another.
        backends: of the engine. One that cannot be built is listed with the reason.
        precisions: of weights and arithmetic.
        rounds: times that each figure is taken; the samples are shared out among them.
        num_samples: at most so many are used; ``None``: all.
        threads: on the CPU; ``None``: as many as PyTorch has now.
        smaller: also time the networks that end at one exit.
        trace: of exactly these samples, to compare answers with; ``None``: it is recorded here.
        calibration: inputs on which ``"int8"`` is calibrated; no images of those that are timed.
        options: of each back end by name.
        progress: draw a bar on the terminal.

    Returns:
        Times, ratios and accuracies.

    Raises:
        UnknownName: there is no such back end or precision.
        ConfigError: an option is not usable, there are too few samples, or no back end can be built.
        TraceError: the Trace is of other samples.
    """
    images, labels = _some(images, labels, num_samples)
    _check(images, labels, batch_sizes, backends, precisions, rounds)
    policies = {one: policy[one] if isinstance(policy, Mapping) else policy for one in _known(policy, precisions)}
    if threads is not None and threads < 1:
        raise ConfigError(f"a CPU runs at least one thread, got threads={threads}.")
    with num_threads(threads):
        trace = _trace(sdn, images, labels, trace)
        example = take_rows(images, slice(0, 4))
        workshop = Workshop(sdn, policies, example, trace, options or {}, calibration, batch_sizes)
        workshop.build(backends, precisions, smaller=smaller, progress=progress)
        timings: list[Timing] = []
        with bar("bench", rounds * len(batch_sizes), shown=progress) as line:
            for batch_size in batch_sizes:
                line.say(f"batch {batch_size}")
                lanes = [lane for lane in workshop.lanes if batch_size > lane.above]
                tallies = time_in_turn(lanes, images, batch_size, rounds, line.advance)
                taken = list(_timings(lanes, tallies, batch_size, trace, policies))
                timings += [*taken, *_fastest_plain(taken)]
        threads = torch.get_num_threads()
    used = {name: version(package) for name, package in VERSIONS.items() if name in {t.backend for t in timings}}
    return SpeedReport(
        tuple(timings),
        tuple(workshop.left_out),
        {name: one.to_dict() for name, one in policies.items()},
        tuple(trace.correct.double().mean(0).tolist()),
        tuple(_alone(sdn.costs)),
        rounds,
        threads,
        str(next(sdn.parameters()).device),
        {"torch": torch.__version__, **used},
    )


def first_samples(samples: Samples, number: int) -> Batch:
    """At most so many samples in one batch: with the classes in proportion where they can be picked, else the first."""
    if number < 1:
        raise ConfigError(f"at least one sample is taken, got {number}.")
    some = samples.sample(number) if isinstance(samples, IndexedSamples) else samples
    return next(iter(some.batches(number)))


def rows_of(trace: Trace, ids: Int[Tensor, " n"]) -> Trace:
    """The part of a Trace that has these ids, in their order.

    Raises:
        TraceError: it lacks some.
    """
    place = {id: row for row, id in enumerate(trace.ids.tolist())}
    missing = [id for id in ids.tolist() if id not in place]
    if missing:
        raise TraceError(f"the recorded Trace lacks {len(missing)} of the samples. Record it anew: shallowdeep record")
    return trace.select(torch.tensor([place[id] for id in ids.tolist()]))


def sharing_threads(precisions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by which every session of ONNX Runtime in this process shares one pool of threads, from now on.

    Raises:
        ConfigError: this onnxruntime has none, or a network is to be quantised, which opens sessions of its own.
    """
    if "int8" in precisions:
        raise ConfigError("int8 is quantised by sessions with threads of their own, so none can share a pool.")
    if not hasattr(require("onnxruntime", extra="onnx"), "set_global_thread_pool_sizes"):
        raise ConfigError(
            "this onnxruntime has no pool of threads to be shared. Upgrade it: pip install -U onnxruntime"
        )
    return {"onnx": {"shared_pool": True}}


def _some(images: Any, labels: Tensor, num_samples: int | None) -> tuple[Any, Tensor]:
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"a benchmark uses at least one sample, got num_samples={num_samples}.")
    return take_rows(images, slice(0, num_samples)), labels[:num_samples]


def _known(policy: ExitPolicy | Mapping[str, ExitPolicy], precisions: Sequence[str]) -> Sequence[str]:
    wanted = list(dict.fromkeys(["fp32", *precisions]))
    missing = [one for one in wanted if isinstance(policy, Mapping) and one not in policy]
    if missing:
        raise ConfigError(f"no policy for {', '.join(missing)}. Give one for each of {', '.join(wanted)}.")
    return wanted


def _check(
    images: Any,
    labels: Tensor,
    batch_sizes: Sequence[int],
    backends: Sequence[str],
    precisions: Sequence[str],
    rounds: int,
) -> None:
    for kind, names, known in (("back end", backends, BACKENDS), ("precision", precisions, PRECISIONS)):
        for name in names:
            if name not in known:
                raise UnknownName(kind, name, known)
    if "plain" in backends:
        raise ConfigError("'plain' is what every back end is compared to; name the back ends that leave early.")
    if not batch_sizes or min(batch_sizes) < 1 or rounds < 1 or not backends or not precisions:
        raise ConfigError(
            "a benchmark needs batch sizes and rounds of at least 1, a back end and a precision; got "
            f"batch_sizes={tuple(batch_sizes)}, rounds={rounds}, backends={tuple(backends)}, "
            f"precisions={tuple(precisions)}."
        )
    if row_counts(images) != {len(labels)}:
        raise ConfigError(f"there are {len(labels)} labels for inputs of {sorted(row_counts(images))} rows.")
    if len(labels) < max(batch_sizes):
        raise ConfigError(f"batches of {max(batch_sizes)} need as many samples at least, got {len(labels)}.")


def _trace(sdn: ShallowDeepNetwork, images: Any, labels: Tensor, trace: Trace | None) -> Trace:
    if trace is None:
        parts = [slice(first, first + 256) for first in range(0, len(labels), 256)]
        return record(sdn, [(take_rows(images, part), labels[part]) for part in parts])
    if trace.labels is None or trace.num_exits != sdn.num_exits or not torch.equal(trace.labels.cpu(), labels.cpu()):
        raise TraceError("the Trace is not of these samples and this network: its exits or labels differ.")
    return trace


def _alone(costs: Costs) -> list[float]:
    """What a network costs that ends at each exit, as a share of the plain one."""
    totals = np.add(costs.backbone_flops, costs.head_flops) / (costs.plain_flops or costs.backbone_flops[-1])
    return totals.tolist()


def _timings(
    lanes: Sequence[Lane],
    tallies: Sequence[Tally],
    batch_size: int,
    trace: Trace,
    policies: Mapping[str, ExitPolicy],
) -> Iterator[Timing]:
    for lane, tally in zip(lanes, tallies, strict=True):
        key = (batch_size, lane.backend, lane.precision)
        found = _answered(tally, trace)
        if lane.variant == EXITS and lane.precision == "fp32":
            found |= agreement(tally.labels, tally.exits, trace, policies["fp32"])
        elif lane.variant not in (EXITS, ONE_AT_A_TIME):  # no policy decides there
            found = {name: found[name] for name in ("n", "accuracy") if name in found}
        yield Timing(*key, lane.variant, tuple(tally.latencies_ms), **found, device=lane.device)
        for variant, values in tally.stages_ms.items():
            yield Timing(*key, variant, tuple(values), device=lane.device)


def _fastest_plain(timings: Sequence[Timing]) -> Iterator[Timing]:
    """For each run time and precision the network without exits, as it is the fastest: with whole batches or parts."""
    found: dict[tuple[str, str], Timing] = {}
    for one in timings:
        key = (one.backend, one.precision)
        if one.variant in (WHOLE_BATCH, IN_PARTS):
            found[key] = min(one, found.get(key, one), key=lambda timing: timing.latency_ms.median)
    for one in found.values():
        yield dataclasses.replace(one, variant=PLAIN)


def _answered(tally: Tally, trace: Trace) -> dict[str, Any]:
    done = tally.labels >= 0
    if not done.any() or trace.labels is None:
        return {}
    shares = np.bincount(tally.exits[done], minlength=trace.num_exits) / done.sum()
    return {
        "n": int(done.sum()),
        "accuracy": float((tally.labels == trace.labels.numpy())[done].mean()),
        "cost": float(tally.costs[done].mean()),
        "exit_shares": tuple(shares.tolist()),
    }


def agreement(labels: np.ndarray, exits: np.ndarray, trace: Trace, policy: ExitPolicy) -> dict[str, int]:
    """Answers that are not the replay's, and how many of them rounding explains.

    A tie is a sample whose answer is the replay's after a threshold moved by ``TIE``, or whose two largest
    probabilities lie that near at the exit it left at.

    Args:
        labels: answered, -1 where there is no answer.
        exits: where each sample left.
        trace: of the same samples, fp32.
        policy: that decided.

    Returns:
        ``differing`` and, of those, ``ties``.
    """
    expected = replay(trace, policy)
    differ = (labels >= 0) & _unlike(labels, exits, expected)
    tied = np.zeros(len(labels), dtype=bool)
    for moved in nudged(thresholds_of(policy)):
        tied |= ~_unlike(labels, exits, replay(trace, with_numbers(policy, moved)))
    top = torch.stack([logits.softmax(-1).topk(min(2, logits.shape[1])).values for logits in trace.logits])
    gaps = (top[..., 0] - top[..., -1]).numpy()
    tied |= (gaps < TIE)[np.minimum(np.maximum(exits, 0), expected.exits.numpy()), np.arange(len(labels))]
    return {"differing": int(differ.sum()), "ties": int((differ & tied).sum())}


def _unlike(labels: np.ndarray, exits: np.ndarray, expected: Any) -> np.ndarray:
    return (labels != expected.predictions.numpy()) | (exits != expected.exits.numpy())
