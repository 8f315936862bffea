"""What a visitor sends becomes an image, or one sentence that says why not."""

from __future__ import annotations

from typing import Any

from shallowdeep.data.files.decode import decode, image_size
from shallowdeep.errors import DataError

MOST_PIXELS = 50_000_000
"""Of an upload; three bytes each are held in memory while it is made small."""

# content, not name: what a file says of itself in its first bytes
_BEGINNINGS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
}


class Refused(DataError):
    """An upload is not used.

    Args:
        message: one sentence or two, with what to do.
        status: of HTTP, that says the same to a program.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def too_large(most_mb: float) -> Refused:
    """What is said of a file beyond the limit, by the page before it is sent and by the server."""
    return Refused(
        f"The file is larger than {most_mb:g} MB, so it is not used. "
        "Choose a smaller one, or start with a larger --max-upload.",
        413,
    )


def read_upload(content: bytes) -> Any:
    """An upload as an image.

    Args:
        content: a file's bytes, of PNG, JPEG, WebP, GIF (its first frame) or BMP, whatever its name says.

    Returns:
        A Pillow image of mode RGB.

    Raises:
        Refused: it is no such image (415), has too many pixels (413) or is damaged (422).
        MissingExtra: Pillow is not installed.
    """
    if not content:
        raise Refused("The file is empty. Choose an image.", 422)
    kind = kind_of(content)
    if kind is None:
        raise Refused(
            "By its content this is no PNG, JPEG, WebP, GIF or BMP image, whatever its name says. "
            "Choose an image file, or save it as one of these.",
            415,
        )
    try:
        height, width = image_size(content, "the upload")
        if height * width <= MOST_PIXELS:
            return decode(content, "the upload")
    except DataError as error:
        raise Refused(f"This {kind} image cannot be read: it is damaged or too large ({_why(error)}). "
                      "Copy or download it again, or choose another.", 422) from None  # fmt: skip
    raise Refused(
        f"The image has {width:,} × {height:,} pixels; at most {MOST_PIXELS // 1_000_000} million are read. "
        "Make it smaller.",
        413,
    )


def kind_of(content: bytes) -> str | None:
    """The format that the first bytes name; ``None``: none of those that are read.

    >>> kind_of(b"GIF89a...")
    'GIF'
    >>> kind_of(b"plain text, called cat.png")
    """
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    return next((kind for kind, beginnings in _BEGINNINGS.items() if content.startswith(beginnings)), None)


def _why(error: DataError) -> str:
    """What the decoder found, without its own advice."""
    text = str(error)
    return text[text.find("(") + 1 : text.rfind(")")] or text
