"""One encoded image becomes colours, or an error that names it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from shallowdeep.errors import DataError, require

T = TypeVar("T")

# those that occur in data sets: Pillow knows dozens more, some of which start other programs
FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def decode(content: bytes | None, where: str) -> Any:
    """The image as eight-bit red, green and blue.

    Transparency is dropped, not laid on a colour, and a camera's note of how it was held (EXIF orientation) is
    not looked at: as torchvision's and timm's loaders do, so that published accuracies compare. Of 16-bit
    grays the upper eight bits are taken. Of several frames the first.

    Args:
        content: a file's bytes: PNG, JPEG, WebP, GIF, BMP, TIFF or PPM.
        where: what the image is called in errors.

    Returns:
        A Pillow image of mode RGB.

    Raises:
        DataError: it is truncated, of no known format, or larger than Pillow's limit for images that are made to
            fill the memory (``PIL.Image.MAX_IMAGE_PIXELS``).
        MissingExtra: Pillow is not installed.
    """
    return _opened(content, where, _in_rgb)


def image_size(content: bytes | None, where: str) -> tuple[int, int]:
    """Height and width, from the header alone.

    Raises:
        DataError: as ``decode``.
    """
    return _opened(content, where, lambda image: (image.height, image.width))


def _opened(content: bytes | None, where: str, use: Callable[[Any], T]) -> T:
    pillow = require("PIL.Image", extra="data")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata of images that are sound
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(content or b""), formats=FORMATS) as image:
                return use(image)
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead them to
        raise DataError(
            f"{where}: cannot decode the image ({_words(error)}). Copy or download the file again, or leave it out."
        ) from None


def _words(error: Exception) -> str:
    # its message otherwise holds the address of the buffer, different in every run
    return "of no known format" if type(error).__name__ == "UnidentifiedImageError" else str(error) or repr(error)


def _in_rgb(image: Any) -> Any:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255, and leave most of them white
        pillow = require("PIL.Image", extra="data")
        image = pillow.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
