"""A network as a phase of training wants it, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shallowdeep.errors import ConfigError
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import Phase


@contextmanager
def laid_out_for(sdn: ShallowDeepNetwork, recipe: Recipe) -> Iterator[None]:
    """Channels last inside, where the recipe wants that; afterwards every weight lies as it did.

    A frozen network would otherwise give its answers in another order of sums than before.
    """
    maps = [t for t in (*sdn.parameters(), *sdn.buffers()) if t.ndim == 4 and t.is_floating_point()]
    before = [(t, t.stride()) for t in maps if recipe.channels_last]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
        yield
    finally:
        for tensor, strides in before:
            if tensor.stride() != strides:
                place = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
                tensor.data = place.copy_(tensor.data)


@contextmanager
def frozen_for(sdn: ShallowDeepNetwork, phase: Phase) -> Iterator[None]:
    """Freeze what a phase does not train; afterwards, and after an error, all is as frozen as before."""
    frozen, needed = sdn.frozen, [(parameter, parameter.requires_grad) for parameter in sdn.parameters()]
    if frozen != (phase.trains == "exits"):
        sdn.freeze_backbone(not frozen)
    if phase.trains == "backbone":
        sdn.exits.requires_grad_(False)  # several processes wait for the gradient of every weight that wants one
    try:
        yield
    finally:
        sdn.frozen = frozen
        for parameter, need in needed:
            parameter.requires_grad_(need)
        sdn.zero_grad(set_to_none=True)
        sdn.eval()


@contextmanager
def quick_in_bf16(sdn: ShallowDeepNetwork, phase: Phase, device: torch.device, precision: str) -> Iterator[None]:
    """Strided depthwise convolutions in float32, where a CPU trains the backbone in bf16; afterwards all is as before.

    For the gradient of such a convolution's inputs oneDNN falls back on a kernel that takes 80 to 140 ms in bf16 and 2
    to 19 ms in float32 (those of MobileNet, batches of 128, one thread). Others are quicker in bf16 and stay so.
    """
    wanted = device.type == "cpu" and precision == "bf16" and phase.trains != "exits"
    slow = [one for one in sdn.modules() if wanted and isinstance(one, nn.Conv2d) and _strided_depthwise(one)]
    before = [vars(one).get("forward") for one in slow]
    for one in slow:
        one.forward = _in_float32(one.forward)
    try:
        yield
    finally:
        for one, forward in zip(slow, before, strict=True):
            del one.forward
            if forward is not None:
                one.forward = forward


def _strided_depthwise(one: nn.Conv2d) -> bool:
    return one.groups == one.in_channels > 1 and max(one.stride) > 1


def _in_float32(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def in_float32(input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(input.float()).to(input.dtype)

    return in_float32


def trained_by(sdn: ShallowDeepNetwork, phase: Phase) -> list[nn.Parameter]:
    """What a phase moves; a final head of its own belongs to the backbone, whose last exit it is."""
    exits = set(sdn.exits.parameters())
    found = [
        parameter
        for parameter in sdn.parameters()
        if parameter.requires_grad and phase.trains in ("all", "exits" if parameter in exits else "backbone")
    ]
    if not found:
        raise ConfigError(f"a phase trains '{phase.trains}', and the network has no such weights to train.")
    return found
