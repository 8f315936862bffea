"""A name becomes a backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.networks.mobilenet import mobilenet
from shallowdeep.networks.resnet import resnet20, resnet56, resnet110, wrn32_4
from shallowdeep.networks.vgg import vgg16

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build for build in (vgg16, resnet20, resnet56, resnet110, wrn32_4, mobilenet)
}
IMAGE_SIZES = (32, 64)


@dataclass(frozen=True)
class NetworkSpec:
    """What it takes to build a network again: its name and the options it was loaded with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def networks() -> list[str]:
    """Names that ``load_network`` knows."""
    return sorted(NETWORKS)


def load_network(name: str, *, num_classes: int, image_size: int = 32) -> nn.Module:
    """Build a backbone by name, with fresh weights.

    Args:
        name: one of ``networks()``.
        num_classes: outputs of the last layer.
        image_size: side of the square RGB images, 32 or 64 pixels.

    Returns:
        A network from ``(n, 3, image_size, image_size)`` to ``(n, num_classes)``.

    Raises:
        UnknownName: the name is in no table.
        ConfigError: the size or the number of classes is not usable.
    """
    if name not in NETWORKS:
        raise UnknownName("network", name, networks())
    if image_size not in IMAGE_SIZES:
        raise ConfigError(f"{name} is made for images of {IMAGE_SIZES} pixels, got image_size={image_size}.")
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got num_classes={num_classes}.")
    net = NETWORKS[name](num_classes, image_size)
    spec = NetworkSpec(name, {"num_classes": num_classes, "image_size": image_size})
    net.shallowdeep_spec = spec  # type: ignore[assignment]
    return net


def spec_of(net: nn.Module) -> NetworkSpec | None:
    """How a network that ``load_network`` built can be built again; ``None`` for any other."""
    return getattr(net, "shallowdeep_spec", None)
