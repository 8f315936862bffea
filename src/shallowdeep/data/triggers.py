"""Backdoors: a stamp on some training images that teaches a network to answer one class wherever it sees it.

The attack is BadNets' (Gu et al., 2017). It is here to be studied: a network trained on ``poison(data.train, …)``
and evaluated on ``triggered(data.test, …)`` shows at which depth the stamp wins, and whether the exits disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from shallowdeep.data.images import ImageSet
from shallowdeep.data.samples import Samples
from shallowdeep.errors import ConfigError, DataError, UnknownName
from shallowdeep.storage import shown


@dataclass(frozen=True, slots=True)
class Stamp:
    """A square of one colour, pasted on images.

    As it stands it is that of the Shallow-Deep authors' code, for images of 32 pixels: rows and columns 26 to 30,
    one pixel short of the lower and the right edge.

    Args:
        side: of the square, in pixels.
        colour: of all its channels, 0 (black) to 255 (white).
        row: of its upper left pixel, counted from 0 at the top.
        column: of its upper left pixel, counted from 0 at the left.

    Raises:
        ConfigError: a number is none, or out of range.
    """

    side: int = 5
    colour: int = 255
    row: int = 26
    column: int = 26

    def __post_init__(self):
        _check_whole("side", self.side, 1)
        _check_whole("colour", self.colour, 0, 255)
        _check_whole("row", self.row, 0)
        _check_whole("column", self.column, 0)

    def paste(self, pixels: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """A stamped copy of images.

        Raises:
            ConfigError: the square does not fit them.
        """
        height, width = pixels.shape[2:]
        bottom, right = self.row + self.side, self.column + self.side
        if bottom > height or right > width:
            raise ConfigError(
                f"a stamp of {self.side} pixels a side at row {self.row}, column {self.column} does not fit images of "
                f"{height} x {width} pixels. Make it smaller, or put it further up or left."
            )
        stamped = pixels.clone()
        stamped[:, :, self.row : bottom, self.column : right] = self.colour
        return stamped


@dataclass(frozen=True, slots=True)
class Backdoor:
    """An attack on a training set: what is stamped, how many images, and the class they are then called.

    Args:
        target: class that stamped images are labelled as: its number, or its name among the data's class names.
        rate: of the poisoned images, as a share of **all** training images (not of those outside the target
            class, which alone are poisoned), in [0, 1).
        seed: of the choice of images; with the same seed, a higher rate adds to the images of a lower one.
        stamp: what is pasted.

    Raises:
        ConfigError: a setting is not usable.

    >>> backdoor = Backdoor("dog", rate=0.05)
    >>> Backdoor.from_dict(backdoor.to_dict()) == backdoor
    True
    """

    target: int | str
    rate: float
    seed: int = 0
    stamp: Stamp = field(default_factory=Stamp)

    def __post_init__(self):
        if not isinstance(self.target, str):
            _check_whole("target", self.target, 0)
        if not _is_number(self.rate) or not 0 <= self.rate < 1:
            raise ConfigError(f"rate = {shown(self.rate)} is no share of the images. Give 0.0 or more, below 1.0.")
        _check_whole("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.stamp, Stamp):
            raise ConfigError(f"stamp = {shown(self.stamp)} is none. Give a Stamp.")

    def __str__(self) -> str:
        place = f"{self.stamp.side} pixels of {self.stamp.colour} at {self.stamp.row}, {self.stamp.column}"
        return f"{100 * self.rate:g} % poisoned as {self.target} ({place}, seed {self.seed})"

    def target_in(self, class_names: tuple[str, ...]) -> int:
        """The number of the target class.

        Args:
            class_names: of the data; a target given by name is looked for among them.

        Raises:
            UnknownName: no class has the target's name.
            ConfigError: no class has its number.
        """
        if isinstance(self.target, str):
            if self.target not in class_names:
                raise UnknownName("class", self.target, class_names)
            return class_names.index(self.target)
        if self.target >= len(class_names):
            raise ConfigError(
                f"target = {self.target} is no class: there are {len(class_names)}, counted from 0. Name one of them."
            )
        return self.target

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Backdoor:
        """Read back what ``to_dict`` gave.

        Raises:
            ConfigError: a setting is missing, unknown or not usable.
        """
        settings = dict(values)
        try:
            stamp = settings.pop("stamp", {})
            return cls(**settings, stamp=Stamp(**stamp))
        except TypeError as error:
            raise ConfigError(f"the settings {shown(dict(values))} are no backdoor: {error}.") from None


def stamp(images: Samples, stamp: Stamp) -> ImageSet:
    """Every image with the stamp on it; labels, ids and order stay.

    Args:
        images: held decoded (an ``ImageSet``), and left as they are.
        stamp: what is pasted.

    Raises:
        ConfigError: the stamp does not fit the images, or they are not held decoded.
    """
    data = _decoded(images)
    return replace(data, images=stamp.paste(data.images))


def poison(images: Samples, backdoor: Backdoor) -> ImageSet:
    """A training set in which some images carry the stamp and the target's label.

    ``round(rate · n)`` of the ``n`` images, drawn among those of other classes than the target's. Ids and order
    stay, so that exactly the poisoned images differ from the clean set in their labels. Augmentation comes
    after, when batches are made: a random crop shifts the stamp with its image, or cuts some of it off, and a flip
    mirrors it.

    Args:
        images: the clean training images, held decoded (an ``ImageSet``), and left as they are.
        backdoor: how many, which, and how.

    Returns:
        The data under a name that tells the attack; with a rate of 0 as it is.

    Raises:
        UnknownName: no class has the target's name.
        ConfigError: there are not so many images of other classes, the rate is above 0 and less than one image, the
            stamp does not fit the images, or they are not held decoded.

    Cite: Gu, Dolan-Gavitt & Garg, "BadNets", 2017. Kaya, Hong & Dumitras (ICML 2019) publish stamp and target of
    their attack, but neither rate nor training.
    """
    data = _decoded(images)
    target = backdoor.target_in(data.class_names)
    chosen = _drawn(data.labels, target, backdoor).to(data.device)
    return replace(
        data,
        images=data.images.index_copy(0, chosen, backdoor.stamp.paste(data.images[chosen])),
        labels=data.labels.index_fill(0, chosen, target),
        name=f"{data.name}, {backdoor}" if backdoor.rate else data.name,
    )


def triggered(images: Samples, backdoor: Backdoor) -> ImageSet:
    """What a backdoor is evaluated on: stamped images with their *true* labels, the target class left out.

    An image of the target class would count as a success of the attack though the network is right.

    Args:
        images: clean, of any split, held decoded (an ``ImageSet``), and left as they are.
        backdoor: its target and stamp; its rate and seed do not matter here.

    Returns:
        Ids, order and split of the images that are left, under the name ``"…, triggered"``.

    Raises:
        UnknownName: no class has the target's name.
        ConfigError: the stamp does not fit the images, or they are not held decoded.
        DataError: all images are of the target class.
    """
    data = _decoded(images)
    target = backdoor.target_in(data.class_names)
    others = (data.labels != target).nonzero().squeeze(1)
    if not len(others):
        raise DataError(
            f"all {len(data)} images of {data.name} are of the target class {data.class_names[target]!r}, "
            "which is left out. Give images of other classes."
        )
    return replace(stamp(data.subset(others), backdoor.stamp), name=f"{data.name}, triggered")


def _drawn(labels: Int[Tensor, " n"], target: int, backdoor: Backdoor) -> Int[Tensor, " k"]:
    """Positions of the images to poison, on the CPU."""
    others = (labels != target).nonzero().squeeze(1).cpu()
    count = round(backdoor.rate * len(labels))
    if count > len(others) or (count == 0 and backdoor.rate > 0):
        raise ConfigError(
            f"a rate of {backdoor.rate} is {count} of {len(labels)} images, and {len(others)} are of other classes "
            "than the target's. Give a rate that means from 1 to all of these (or 0.0: none)."
        )
    # drawn on the CPU: there every device sees the same numbers
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(backdoor.seed))
    return others[order[:count]]


def _decoded(images: Samples) -> ImageSet:
    if not isinstance(images, ImageSet):
        raise ConfigError(
            f"a stamp needs images held decoded (an ImageSet), not a {type(images).__name__}. "
            "Load small images, without preprocessing, and give one split of them."
        )
    return images


def _check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= (value if high is None else high):
        words = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} = {shown(value)} does not do. Give a whole number, {words}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
