"""From an image of any size to a square of pixels: what a pretrained network was evaluated with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from shallowdeep.data.samples import Augmentation
from shallowdeep.errors import ConfigError, require

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_RATIOS = (3 / 4, 4 / 3)  # width by height of random windows, as torchvision's
_LONGEST = 16  # sides by which an image may be longer than wide before its ends are cut off


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How images of any size become squares of one size, and are normalised.

    The shorter side is resized to ``image_size / crop_share``, and a square of ``image_size`` is cut out of the
    middle, as torchvision and timm do it.

    Args:
        image_size: side of the square, in pixels.
        mean: of red, green and blue scaled to 0 .. 1; what batches subtract.
        std: of red, green and blue scaled to 0 .. 1; what batches divide by.
        crop_share: the square's side as a share of the resized shorter side (timm's ``crop_pct``).
        interpolation: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.
        squash: resize both sides alike, whatever the proportions, as many Hugging Face processors do.

    Raises:
        ConfigError: a value is out of its range.
    """

    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_share: float = 0.875
    interpolation: str = "bilinear"
    squash: bool = False

    def __post_init__(self):
        if self.image_size < 1:
            raise ConfigError(f"cannot resize to {self.image_size} pixels. Give 1 or more.")
        if not 0 < self.crop_share <= 1:
            raise ConfigError(f"crop_share is {self.crop_share}. Give a share above 0, up to 1.0: no crop.")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"no interpolation '{self.interpolation}'. Use one of: {', '.join(INTERPOLATIONS)}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean} and std {self.std}: give three of each, every std above 0.")

    @property
    def resized(self) -> int:
        """The shorter side before the crop, in pixels."""
        return math.floor(self.image_size / self.crop_share + 1e-6)  # 160 / (160 / 232) is not to be 231

    @classmethod
    def from_timm(cls, config: Any) -> Preprocessing:
        """What a timm network's ``pretrained_cfg`` (or ``timm.data.resolve_model_data_config``) says.

        Args:
            config: with ``input_size``, ``mean``, ``std``, ``crop_pct``, ``interpolation`` and ``crop_mode``, as a
                mapping or with ``to_dict``; what is left out is this class's default.

        Raises:
            ConfigError: the input is no colour square, or the crop is of another kind.
        """
        config = _plain(config)
        channels, height, width = config.get("input_size") or (3, _default("image_size"), _default("image_size"))
        if channels != 3 or height != width:
            raise ConfigError(f"timm's input_size is {(channels, height, width)}. Only colour squares are read here.")
        mode = config.get("crop_mode") or "center"
        if mode not in ("center", "squash"):
            raise ConfigError(f"timm's crop_mode is '{mode}'. Only 'center' and 'squash' are known here.")
        return cls(
            image_size=height,
            mean=tuple(config.get("mean") or _default("mean")),
            std=tuple(config.get("std") or _default("std")),
            crop_share=config.get("crop_pct") or _default("crop_share"),
            interpolation=config.get("interpolation") or _default("interpolation"),
            squash=mode == "squash",
        )

    @classmethod
    def from_hf(cls, processor: Any) -> Preprocessing:
        """What a Hugging Face image processor does.

        Args:
            processor: a mapping, as in ``preprocessor_config.json``, or with ``to_dict``.

        Raises:
            ConfigError: it does not end in squares of one size, or does what is not known here.
        """
        config = _plain(processor)
        size, crop_share, squash = _hf_geometry(config)
        scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
        plain = not config.get("do_normalize", True)
        mean = (0.0,) * 3 if plain else tuple(config.get("image_mean") or _default("mean"))
        std = (1.0,) * 3 if plain else tuple(config.get("image_std") or _default("std"))
        return cls(
            image_size=size,
            mean=tuple(value / scale for value in mean),
            std=tuple(value / scale for value in std),
            crop_share=crop_share,
            interpolation=_hf_interpolation(config.get("resample", 2)),
            squash=squash,
        )

    def apply(self, image: Any) -> UInt8[np.ndarray, "3 s s"]:
        """The square out of the middle of an image.

        Args:
            image: of Pillow, mode RGB.
        """
        side, image = self.resized, _without_long_ends(image)
        width, height = image.size
        if self.squash:
            size = (side, side)
        elif width <= height:
            size = (side, int(side * height / width))
        else:
            size = (int(side * width / height), side)
        image = self._resize(image, size)
        left, top = (round((length - self.image_size) / 2) for length in size)
        return _pixels(image.crop((left, top, left + self.image_size, top + self.image_size)))

    def apply_randomly(
        self, image: Any, augment: Augmentation, random: np.random.Generator
    ) -> UInt8[np.ndarray, "3 s s"]:
        """A training image: a random window of the original, then a shift and a flip, as far as asked for.

        Args:
            image: of Pillow, mode RGB.
            augment: what is asked for.
            random: where the random numbers come from.
        """
        if augment.min_area < 1:
            width, height = image.size
            window = image.crop(_random_window(width, height, augment.min_area, random))
            pixels = _pixels(self._resize(window, (self.image_size, self.image_size)))
        else:
            pixels = self.apply(image)
        top, left = random.integers(0, 2 * augment.pad + 1, 2)
        if random.random() < 0.5 * augment.flip:
            pixels = pixels[:, :, ::-1]
        padded = np.pad(pixels, ((0, 0), (augment.pad, augment.pad), (augment.pad, augment.pad)))
        return padded[:, top : top + self.image_size, left : left + self.image_size]

    def _resize(self, image: Any, size: tuple[int, int]) -> Any:
        ways = require("PIL.Image", extra="data").Resampling
        return image.resize(size, getattr(ways, self.interpolation.upper()))


def _plain(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else config.to_dict()


def _default(name: str) -> Any:
    """What a field of ``Preprocessing`` is when it is not given."""
    return Preprocessing.__dataclass_fields__[name].default


def _pixels(image: Any) -> UInt8[np.ndarray, "3 h w"]:
    return np.asarray(image).transpose(2, 0, 1)


def _without_long_ends(image: Any) -> Any:
    """The middle of an image so long that to resize it would take the memory of thousands."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _random_window(width: int, height: int, min_area: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a window, drawn as torchvision's RandomResizedCrop does."""
    for _ in range(10):
        area = width * height * random.uniform(min_area, 1)
        ratio = math.exp(random.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    # an image longer than that: the middle of it
    w, h = min(width, round(height * _RATIOS[1])), min(height, round(width / _RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _hf_geometry(config: Mapping[str, Any]) -> tuple[int, float, bool]:
    """Size, share of the crop, and whether both sides are resized alike."""
    if not config.get("do_resize", True):
        raise ConfigError("the image processor does not resize, so images would differ in size. Set do_resize.")
    short, square = _hf_size(config.get("size"))
    side = short or square
    if "crop_pct" in config and short:  # ConvNeXt's: no crop from 384 pixels on
        return (side, 1.0, True) if side >= 384 else (side, config["crop_pct"] or 1.0, False)
    if config.get("do_center_crop"):
        crop = max(_hf_size(config.get("crop_size")))
        if crop > side:
            raise ConfigError(f"the image processor crops {crop} pixels out of {side}. Set a smaller crop_size.")
        return crop, crop / side, not short
    if short:
        raise ConfigError("the image processor keeps the proportions and crops nothing. Set do_center_crop.")
    return side, 1.0, True


def _hf_size(size: Any) -> tuple[int, int]:
    """Shortest edge and side of the square: one of the two, the other 0."""
    if isinstance(size, int):
        return 0, size
    found = dict(size or {})
    if found.get("shortest_edge") and not found.get("longest_edge"):
        return found["shortest_edge"], 0
    if found.get("height") and found.get("height") == found.get("width"):
        return 0, found["height"]
    raise ConfigError(f"the image processor's size is {size}. Only a shortest edge or a square are known here.")


def _hf_interpolation(resample: Any) -> str:
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    found = names.get(2 if resample is None else int(resample))
    if found is None:
        raise ConfigError(f"the image processor's resample is {resample}. Known: {names}.")
    return found
