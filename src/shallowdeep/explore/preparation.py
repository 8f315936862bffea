"""An image of any size becomes what a run's network takes, exactly as its data were prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from shallowdeep.data.assemble import LARGEST, Look
from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.images import ImageSet
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.sources import SOURCES
from shallowdeep.errors import DataError, NetworkError, require
from shallowdeep.networks.inputs import example_inputs_for, preprocessing_of
from shallowdeep.runs.run import Run


@dataclass(frozen=True)
class Preparation:
    """How images are shown to a network.

    Args:
        shape: channels, height and width in pixels.
        mean: one per channel, of pixels scaled to 0 .. 1; what is subtracted.
        std: one per channel, of pixels scaled to 0 .. 1; what is divided by.
        preprocessing: how an image becomes that shape; ``None``: the largest middle part of those proportions is
            resized, which leaves an image of that size as it is.

    Raises:
        DataError: the channels are neither grey nor colours.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        if self.shape[0] not in (1, 3):
            raise DataError(f"images of {self.shape[0]} channels cannot be shown or sent; 1 or 3 can.")

    @classmethod
    def of(cls, samples: ImageSet | EncodedImages) -> Preparation:
        """How a data set's images are prepared."""
        if isinstance(samples, ImageSet):
            channels, height, width = samples.images.shape[1:]
            return cls((channels, height, width), samples.mean, samples.std)
        found = samples.preprocessing
        return cls((3, found.image_size, found.image_size), found.mean, found.std, found)

    @property
    def blank(self) -> UInt8[Tensor, "c h w"]:
        """A black image, as ``pixels`` gives one."""
        return torch.zeros(self.shape, dtype=torch.uint8)

    def pixels(self, image: Any) -> UInt8[Tensor, "c h w"]:
        """What the network sees of an image.

        Args:
            image: of Pillow, mode RGB, of any size.
        """
        channels, height, width = self.shape
        if self.preprocessing is not None:
            return torch.from_numpy(self.preprocessing.apply(image).copy())
        pillow, ops = require("PIL.Image", extra="data"), require("PIL.ImageOps", extra="data")
        fitted = ops.fit(image, (width, height), method=pillow.Resampling.BILINEAR)
        found = torch.from_numpy(np.array(fitted.convert("L") if channels == 1 else fitted))
        return found.view(height, width, channels).permute(2, 0, 1).contiguous()

    def inputs(self, pixels: UInt8[Tensor, "c h w"]) -> Float[Tensor, "1 c h w"]:
        """The same, normalised, as a batch of one."""
        zero = torch.zeros(1, dtype=torch.int64)
        return next(ImageSet(pixels[None], zero, zero, self.mean, self.std, ("any",)).batches(1)).inputs


def prepare_without_data(run: Run, backbone: nn.Module) -> Preparation:
    """How a run's images are prepared, from its configuration and network alone.

    Args:
        run: whose data are not at hand.
        backbone: the run's.

    Raises:
        NetworkError: nothing says what size the images have.
    """
    config = run.config
    known = preprocessing_of(backbone) if run.prepares else None
    if known is not None:
        return Preparation((3, known.image_size, known.image_size), known.mean, known.std, known)
    example = example_inputs_for(backbone)
    if not isinstance(example, Tensor):
        raise NetworkError(f"{config.network} takes no images.")
    channels, height, width = example.shape[1:]
    look = SOURCES[config.data].look if config.data in SOURCES else Look()
    shape = Preprocessing() if max(height, width) > LARGEST else None
    return Preparation((channels, height, width), look.mean, look.std, shape)
