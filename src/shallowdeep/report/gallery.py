"""Real images behind the figures: simple and complex ones, and those that overthinking destroyed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from shallowdeep.analysis.overthinking import Overthinking, measure_overthinking
from shallowdeep.data.images import ImageSet
from shallowdeep.errors import DataError, require
from shallowdeep.runs.run import Run
from shallowdeep.traces.trace import Trace

PER_EXIT, PER_ROW = 6, 12
LARGEST_SIDE = 96
MAX_CLASSES = 20


@dataclass(frozen=True)
class Picture:
    """One image of a gallery.

    Attributes:
        row: of the sample in the Trace.
        id: of the sample.
        url: the image itself, as a data URI.
        label: its true class.
        answers: what each exit answers.
        confidences: of each exit.
    """

    row: int
    id: int
    url: str
    label: str
    answers: tuple[str, ...]
    confidences: tuple[float, ...]


@dataclass(frozen=True)
class Gallery:
    """Some images that have something in common.

    Attributes:
        title: what that is.
        total: how many there are in the split.
        pictures: the first of them, in the split's order.
    """

    title: str
    total: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class ClassLine:
    """How much a network overthinks on one class.

    Attributes:
        name: of the class.
        found: measured on its samples alone.
    """

    name: str
    found: Overthinking


def class_names(trace: Trace) -> tuple[str, ...]:
    """Of all outputs; numbers where they have no names."""
    names = trace.info.class_names
    return names if len(names) == trace.num_outputs else tuple(str(i) for i in range(trace.num_outputs))


def by_class(trace: Trace) -> tuple[ClassLine, ...]:
    """Overthinking on each class that has samples, the most destructive first.

    Raises:
        TraceError: the Trace has no labels.
    """
    names = class_names(trace)
    classes = trace.true_labels.unique().tolist()
    lines = [ClassLine(names[c], measure_overthinking(trace.select(trace.true_labels == c))) for c in classes]
    return tuple(sorted(lines, key=lambda line: -line.found.destructive))


def make_galleries(images: ImageSet, trace: Trace) -> tuple[tuple[Gallery, ...], tuple[Gallery, ...]]:
    """Images by the exit that is right first, and images that later exits got wrong.

    Args:
        images: of the samples, in any order.
        trace: with labels.

    Returns:
        One gallery per exit; then those of destructive overthinking.

    Raises:
        MissingExtra: pillow is not installed.
    """
    right = trace.correct
    known = right.int().cummax(1).values.bool()
    first = known & ~torch.cat([torch.zeros_like(known[:, :1]), known[:, :-1]], dim=1)
    last = trace.num_exits - 1
    simple = [
        (f"first right at {'the last exit' if exit == last else f'exit {exit}'}", first[:, exit], PER_EXIT)
        for exit in range(trace.num_exits)
    ]
    only_first = right[:, 0] & ~right[:, 1:].any(1)
    destroyed = right[:, 0] & ~right[:, -1]
    lost = [
        ("right at the first exit only: every later one is wrong", only_first, PER_ROW),
        ("right at the first exit and at others, wrong at the end", destroyed & ~only_first, PER_ROW),
        ("right at a later exit, wrong at the end", known[:, -2] & ~right[:, -1] & ~right[:, 0], PER_ROW),
    ]
    names = class_names(trace)
    return tuple(
        tuple(_gallery(title, mask, most, trace, images, names) for title, mask, most in part)
        for part in (simple, lost)
    )  # pyright: ignore[reportReturnType]


def _gallery(
    title: str, mask: Bool[Tensor, " n"], most: int, trace: Trace, images: ImageSet, names: tuple[str, ...]
) -> Gallery:
    rows = mask.nonzero().flatten()
    place = {id: number for number, id in enumerate(images.ids.tolist())}
    pictures = [_picture(row, trace, images.images[place[int(trace.ids[row])]], names) for row in rows[:most].tolist()]
    return Gallery(title, len(rows), tuple(pictures))


def _picture(row: int, trace: Trace, pixels: UInt8[Tensor, "c h w"], names: tuple[str, ...]) -> Picture:
    return Picture(
        row,
        int(trace.ids[row]),
        png_url(pixels),
        names[int(trace.true_labels[row])],
        tuple(names[answer] for answer in trace.predictions[row].tolist()),
        tuple(trace.confidences[row].tolist()),
    )


def png_url(pixels: UInt8[Tensor, "c h w"], most: int = LARGEST_SIDE) -> str:
    """An image as a PNG data URI.

    Args:
        pixels: the image, grey or in colours.
        most: pixels of its longer side; a larger image is made smaller.

    Raises:
        MissingExtra: pillow is not installed.
    """
    array = pixels.permute(1, 2, 0).cpu().numpy()
    image = require("PIL.Image", extra="data").fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.thumbnail((most, most))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def images_of(run: Run, trace: Trace) -> ImageSet:
    """The images of a run's test split.

    Args:
        run: whose data are at hand.
        trace: of that split, with labels.

    Raises:
        DataError: the data are not at hand, no images held decoded, or not those that were recorded.
    """
    split = run.load_data(run.load().backbone if run.prepares else None).split("test")
    if not isinstance(split, ImageSet):
        raise DataError(f"{run.config.data} holds no decoded images, so there are none to show here.")
    if split.images.shape[1] not in (1, 3):
        raise DataError(f"images of {split.images.shape[1]} channels are not shown; 1 or 3 are.")
    labels = dict(zip(split.ids.tolist(), split.labels.tolist(), strict=True))
    recorded = dict(zip(trace.ids.tolist(), trace.true_labels.tolist(), strict=True))
    if any(labels.get(id) != label for id, label in recorded.items()):
        raise DataError(f"{run.config.data} is not the data that {run.folder.name} was recorded on. Record it anew.")
    return split
