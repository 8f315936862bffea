"""The data sets of studies, as their makers published them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A data set, known without reading it.

    Attributes:
        title: as people write it.
        num_classes: labels.
        image_size: pixels a side.
        num_images: of the complete training data.
        num_held_out: of them, for validation, where nothing else is asked for.
    """

    title: str
    num_classes: int
    image_size: int
    num_images: int
    num_held_out: int


TASKS = {
    "cifar10": Task("CIFAR-10", 10, 32, 50_000, 5_000),
    "cifar100": Task("CIFAR-100", 100, 32, 50_000, 5_000),
    "tinyimagenet": Task("Tiny ImageNet", 200, 64, 100_000, 10_000),
    "digits": Task("digits", 10, 32, 1_437, 180),
}


def title_of(data: str) -> str:
    """A data set's name as people write it."""
    return TASKS[data].title if data in TASKS else data


def is_complete(data: str, num_images: int) -> bool:
    """Whether so many training and validation images are all that the data set has; unknown data is taken to be."""
    return data not in TASKS or num_images >= TASKS[data].num_images
