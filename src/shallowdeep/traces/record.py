"""Running a network over a split once, and keeping what every exit said."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.data.pytrees import map_tensors
from shallowdeep.data.samples import Samples
from shallowdeep.data.streams import as_samples
from shallowdeep.errors import ConfigError, DataError, NetworkError
from shallowdeep.networks.calls import evaluating, exact_float32
from shallowdeep.networks.costs import Costs
from shallowdeep.networks.multi_exit import MultiExitNetwork
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import spec_of
from shallowdeep.processes import gather, is_first, shard
from shallowdeep.progress import track
from shallowdeep.traces.trace import Trace, TraceInfo
from shallowdeep.versions import versions_of


def record(
    network: nn.Module,
    data: Samples | Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    batch_size: int = 500,
    split: str | None = None,
    strategy: str = "",
    progress: bool = False,
) -> Trace:
    """Run a split through a network once and keep every exit's logits.

    In float32 (TF32 and autocast off), in evaluation mode, without augmentation, on the device of the
    network's weights. Beside the logits, memory does not grow with the split. Several processes share the
    split out, and each gets the whole Trace.

    Args:
        network: a Shallow-Deep Network; or any other, with one exit or with a list of logits of its own (it is
            wrapped in ``MultiExitNetwork``). Its mode is restored.
        data: the samples, or any iterable of batches ``(inputs, labels)`` or of inputs alone, such as a
            ``DataLoader``, which is streamed.
        batch_size: samples in a forward; an iterable keeps its own.
        split: ``"train"``, ``"val"`` or ``"test"``, where the data does not say it.
        strategy: how the exits were trained, noted in the Trace.
        progress: draw a bar on the terminal.

    Returns:
        The Trace, on the CPU, in the order of the split (of several processes: ordered by id); without labels
        where the data has none.

    Raises:
        ConfigError: the network's weights are not float32.
        NetworkError: the samples do not fit the network, or it has fewer outputs than there are classes.
        DataError: the data is no samples, or has none, or only some have labels.
    """
    check_float32(network, "a recording")
    samples = as_samples(data, split=split or "")
    sdn = _with_exits(network, samples)
    if sdn.num_outputs < samples.num_classes:
        raise NetworkError(
            f"the network has {sdn.num_outputs} outputs, the data {samples.num_classes} classes. "
            f"Build it with num_classes={samples.num_classes}."
        )
    device = _device(sdn)
    info = describe(sdn, samples, split, strategy)
    with evaluating(sdn), exact_float32(), sdn.tapped():
        return record_with(
            lambda inputs: _forward(sdn, inputs, device),
            samples,
            sdn.costs,
            info,
            batch_size=batch_size,
            progress=progress,
        )


def record_with(
    forward: Callable[[Any], list[Tensor]],
    samples: Samples,
    costs: Costs,
    info: TraceInfo,
    *,
    batch_size: int,
    progress: bool = False,
) -> Trace:
    """``record`` for whatever gives logits.

    Args:
        forward: inputs to one logits tensor ``(n, outputs)`` per exit.
        samples: to run through it once.
        costs: of its exits.
        info: kept in the Trace.
        batch_size: samples in a forward; a stream keeps its own.
        progress: draw a bar on the terminal.
    """
    own = shard()
    batches = track(
        # The same order in all processes, also of a loader that shuffles.
        samples.batches(batch_size, shard=own, seed=0 if own[1] > 1 else None),
        _num_batches(samples, batch_size),
        f"record {info.split}",
        shown=progress and is_first(),
    )
    logits: list[list[Tensor]] = [[] for _ in range(costs.num_exits)]
    labels, ids = [], []
    for batch in batches:
        for store, found in zip(logits, forward(batch.inputs), strict=True):
            store.append(found.float().cpu())
        labels.append(batch.labels)
        ids.append(batch.ids.cpu())
    if len({found is None for found in labels}) > 1:
        raise DataError(f"some batches of {samples.name} have labels and some have none. Label all of them, or none.")
    if own[1] == 1:
        known = None if labels[0] is None else torch.cat(labels).cpu()
        return Trace(tuple(_joined(store) for store in logits), known, torch.cat(ids), costs, info)
    parts = gather((logits, [None if found is None else found.cpu() for found in labels], ids))
    return _merged(parts, costs, info)


def check_float32(net: nn.Module, what: str) -> None:
    """Refuse a network that would not compute in float32.

    Args:
        net: of any kind; weights that are whole numbers do not count.
        what: needs float32, for the message.

    Raises:
        ConfigError: some weights are of another floating-point type.
    """
    others = {p.dtype for p in net.parameters() if p.is_floating_point()} - {torch.float32}
    if others:
        raise ConfigError(
            f"{what} starts from float32 weights, these are {', '.join(map(str, others))} as well. Convert the network "
            "(sdn.float()); another precision is the engine's to choose: Engine(…, precision='bf16').record."
        )


def _merged(parts: list[Any], costs: Costs, info: TraceInfo) -> Trace:
    """One Trace of what several processes recorded, ordered by id; one of them may have met no sample."""
    together = torch.cat([chunk for _, _, ids in parts for chunk in ids])
    order = together.argsort(stable=True)
    known = [chunk for _, labels, _ in parts for chunk in labels]
    logits = tuple(
        torch.cat([chunk for logits, _, _ in parts for chunk in logits[exit]])[order] for exit in range(costs.num_exits)
    )
    return Trace(logits, None if known[0] is None else torch.cat(known)[order], together[order], costs, info)


def _with_exits(network: nn.Module, samples: Samples) -> ShallowDeepNetwork | MultiExitNetwork:
    if isinstance(network, ShallowDeepNetwork | MultiExitNetwork):
        return network
    device = _device(network)
    return MultiExitNetwork(network, map_tensors(lambda t: t.to(device), samples.example_inputs))


def _device(network: nn.Module) -> torch.device:
    weight = next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def _num_batches(samples: Samples, batch_size: int) -> int | None:
    try:
        return samples.num_batches(batch_size)
    except ConfigError:  # a stream may not know
        return None


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor of many, which are let go: both together would be twice the memory for every exit at once."""
    whole = torch.cat(parts)
    parts.clear()
    return whole


def _forward(sdn: ShallowDeepNetwork | MultiExitNetwork, inputs: Any, device: torch.device) -> list[Tensor]:
    try:
        return sdn(map_tensors(lambda t: t.to(device), inputs))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise NetworkError(f"the network does not take inputs of {_shapes(inputs)}: {why}") from error


def _shapes(inputs: Any) -> str:
    shapes: list[str] = []
    map_tensors(lambda t: shapes.append(f"shape {tuple(t.shape[1:])}") or t, inputs)
    return " and ".join(shapes)


def describe(
    sdn: ShallowDeepNetwork | MultiExitNetwork, samples: Samples, split: str | None = None, strategy: str = ""
) -> TraceInfo:
    """What a Trace of a network on some samples says of itself."""
    spec = spec_of(sdn.backbone)
    return TraceInfo(
        model=type(sdn.backbone).__name__ if spec is None else spec.name,
        data=samples.name,
        split=split or samples.split,
        label_spaces=sdn.label_spaces,
        class_names=samples.class_names,
        tree=samples.tree,
        strategy=strategy,
        versions={**versions_of(["shallowdeep"]), "torch": str(torch.__version__)},
    )
