"""Running a network over a split once, and keeping what every exit said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import Tensor

from shallowdeep.data.images import ImageSet
from shallowdeep.errors import NetworkError
from shallowdeep.networks.calls import evaluating
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import spec_of
from shallowdeep.progress import track
from shallowdeep.traces.trace import Trace, TraceInfo


def record(
    sdn: ShallowDeepNetwork,
    images: ImageSet,
    *,
    batch_size: int = 500,
    strategy: str = "",
    progress: bool = False,
) -> Trace:
    """Run a split through the network once and keep every exit's logits.

    In float32 (TF32 and autocast off), in evaluation mode, without augmentation, on the device of the
    network's weights. Beside the logits, memory does not grow with the split.

    Args:
        sdn: the network; its mode is restored.
        images: the split.
        batch_size: images in a forward.
        strategy: how the exits were trained, noted in the Trace.
        progress: draw a bar on the terminal.

    Returns:
        The Trace, on the CPU, in the order of the split.

    Raises:
        NetworkError: the images do not fit the network, or it has fewer outputs than there are classes.
    """
    if sdn.num_outputs < images.num_classes:
        raise NetworkError(
            f"the network has {sdn.num_outputs} outputs, the data {images.num_classes} classes. "
            f"Build it with num_classes={images.num_classes}."
        )
    device = next(sdn.parameters()).device
    logits = [torch.empty(len(images), sdn.num_outputs) for _ in range(sdn.num_exits)]
    batches = track(
        images.batches(batch_size), images.num_batches(batch_size), f"record {images.split}", shown=progress
    )
    with evaluating(sdn), _exact_float32(), torch.autocast(device.type, enabled=False), sdn.tapped():
        for start, batch in zip(range(0, len(images), batch_size), batches, strict=True):
            for store, found in zip(logits, _forward(sdn, batch.inputs.to(device)), strict=True):
                store[start : start + len(found)] = found
    return Trace(tuple(logits), images.labels.cpu(), images.ids.cpu(), sdn.costs, _info(sdn, images, strategy))


def _forward(sdn: ShallowDeepNetwork, inputs: Tensor) -> list[Tensor]:
    try:
        return sdn(inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise NetworkError(f"the network does not take images of shape {tuple(inputs.shape[1:])}: {why}") from error


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Float32 is float32 inside, neither TF32 nor bf16, whatever the caller allows."""
    matmul, cudnn, cpu = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9, which may refuse to be asked in the old way
        places, switch, exact = [matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv], "fp32_precision", "ieee"
    else:
        places, switch, exact = [matmul, cudnn], "allow_tf32", False
    before = [getattr(place, switch) for place in places]
    try:
        for place in places:
            setattr(place, switch, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, switch, value)


def _info(sdn: ShallowDeepNetwork, images: ImageSet, strategy: str) -> TraceInfo:
    spec = spec_of(sdn.backbone)
    return TraceInfo(
        model=type(sdn.backbone).__name__ if spec is None else spec.name,
        data=images.name,
        split=images.split,
        label_spaces=sdn.label_spaces,
        class_names=images.class_names,
        tree=images.tree,
        strategy=strategy,
        versions={"shallowdeep": version("shallowdeep"), "torch": str(torch.__version__)},
    )
