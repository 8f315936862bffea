"""Where the first exit and the last one look: Grad-CAM of what overthinking destroyed, drawn over the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from shallowdeep.analysis.gradcam import gradcam
from shallowdeep.data.images import ImageSet
from shallowdeep.report.gallery import Gallery, class_names, png_url
from shallowdeep.runs.run import Run
from shallowdeep.traces.trace import Trace

ORANGE = (245.0, 140.0, 0.0)
STRONGEST = 0.8  # share of orange where an exit looks most


@dataclass(frozen=True)
class View:
    """What one exit looked at.

    Attributes:
        exit: its name.
        answer: the class it answered, which the map is of.
        url: the image in grey, orange where the exit looked, as a data URI.
    """

    exit: str
    answer: str
    url: str


def make_views(run: Run, images: ImageSet, trace: Trace, galleries: Sequence[Gallery]) -> dict[int, tuple[View, View]]:
    """What the first exit and the last one looked at, for the class each of them answered.

    Args:
        run: whose network is asked.
        images: of the samples, in any order.
        trace: of the same network and samples.
        galleries: whose pictures are looked at.

    Returns:
        Row of each picture in the Trace to its two views.

    Raises:
        NetworkError: an exit's answer rests on no feature map and no tokens.
        FileFormatError: the run has no network.
    """
    rows = sorted({picture.row for gallery in galleries for picture in gallery.pictures})
    if not rows:
        return {}
    place = {id: number for number, id in enumerate(images.ids.tolist())}
    chosen = images.subset([place[int(trace.ids[row])] for row in rows])
    inputs = next(iter(chosen.batches(len(rows)))).inputs
    sdn, names = run.load(), class_names(trace)
    views: list[list[View]] = []
    for exit, name in ((0, "exit 0"), (trace.num_exits - 1, "last")):
        classes = trace.predictions[rows, exit]
        maps = gradcam(sdn, inputs, exit=exit, classes=classes).maps
        views.append(
            [
                View(name, names[int(label)], png_url(tinted(pixels, map)))
                for pixels, map, label in zip(chosen.images, maps, classes, strict=True)
            ]
        )
    return {row: (first, last) for row, first, last in zip(rows, *views, strict=True)}


def tinted(pixels: UInt8[Tensor, "c h w"], map: Float[Tensor, "h w"]) -> UInt8[Tensor, "3 h w"]:
    """An image in grey, the more orange the higher a map is.

    >>> tinted(torch.full((3, 1, 2), 200, dtype=torch.uint8), torch.tensor([[0.0, 1.0]]))[:, 0, 1]
    tensor([236, 152,  40], dtype=torch.uint8)
    """
    grey = pixels.cpu().float().mean(0, keepdim=True).expand(3, -1, -1)
    share = STRONGEST * map
    return (grey + share * (torch.tensor(ORANGE)[:, None, None] - grey)).round().to(torch.uint8)
