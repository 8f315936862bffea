"""Normalisation of images inside an exported network, so that it takes them as uint8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shallowdeep.data.samples import Splits
from shallowdeep.errors import ConfigError
from shallowdeep.inference.stages import as_values


@dataclass(frozen=True)
class Pixels:
    """Normalisation inside the first stage: it takes uint8 images.

    Attributes:
        name: of the network's input that images go into.
        mean: one per channel, of pixels scaled to 0 .. 1.
        std: one per channel, of pixels scaled to 0 .. 1.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """As a batch of an ``ImageSet`` is."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.float().mul(1 / (255 * std)).sub(mean / std)

    def pixels(self, images: Tensor) -> Tensor:
        """The other way round: the nearest uint8 images."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def pixels_of(preprocessing: Any, example_inputs: Any) -> Pixels:
    """What a folder's preprocessing makes of uint8 images.

    Args:
        preprocessing: anything with ``mean`` and ``std`` of pixels scaled to 0 .. 1, as ``Splits`` or a mapping.
        example_inputs: what the network takes, any batch size.

    Raises:
        ConfigError: it has none, or they do not fit the network's inputs.
    """
    found = preprocessing.train if isinstance(preprocessing, Splits) else preprocessing
    mean, std = (
        found.get(name) if isinstance(found, Mapping) else getattr(found, name, None) for name in ("mean", "std")
    )
    if mean is None or std is None:
        raise ConfigError(f"preprocessing has a mean and a std of every channel; this {type(found).__name__} has not.")
    images = [
        name for name, value in as_values(example_inputs).items() if value.ndim == 4 and value.is_floating_point()
    ]
    if len(images) != 1:
        raise ConfigError(f"preprocessing takes a network with one input of images, got {len(images)}.")
    channels = as_values(example_inputs)[images[0]].shape[1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(f"mean {mean} and std {std} do not fit {channels} channels: one of each, every std above 0.")
    return Pixels(images[0], tuple(map(float, mean)), tuple(map(float, std)))
