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

    In float32 (TF32 off), in evaluation mode, without augmentation, on the device of the network's
    weights. Beside the logits, memory does not grow with the split.

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
    with evaluating(sdn), _exact_float32(), sdn.tapped():
        for start, batch in zip(range(0, len(images), batch_size), batches, strict=True):
            for store, found in zip(logits, _forward(sdn, batch.inputs.to(device)), strict=True):
                store[start : start + len(found)] = found
    return Trace(tuple(logits), images.labels.cpu(), images.ids.cpu(), sdn.costs, _info(sdn, images, strategy))


def _forward(sdn: ShallowDeepNetwork, inputs: Tensor) -> list[Tensor]:
    try:
        return sdn(inputs)
    except RuntimeError as error:
        message = str(error).strip().splitlines()[0]
        raise NetworkError(f"the network does not take images of shape {tuple(inputs.shape[1:])}: {message}") from error


@contextmanager
def _exact_float32() -> Iterator[None]:
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


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
