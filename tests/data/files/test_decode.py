import io
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shallowdeep.data.files.decode import decode, image_size
from shallowdeep.errors import DataError

RED = np.tile(np.array([200, 30, 40], np.uint8), (5, 7, 1))


def encode(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def pixels(content):
    return np.asarray(decode(content, "it"))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    picture = Image.fromarray(RED)
    content = encode(picture.quantize(4) if format == "GIF" else picture, format, **options)
    assert np.array_equal(pixels(content), RED)
    assert image_size(content, "it") == (5, 7)


def test_jpeg():
    assert (
        abs(pixels(encode(Image.fromarray(RED), "JPEG", quality=95)).astype(int) - RED).max() < 6
    )  # it loses a little


def test_gray_palette_and_one_bit_images():
    gray = np.arange(35, dtype=np.uint8).reshape(5, 7)
    assert np.array_equal(pixels(encode(Image.fromarray(gray))), np.dstack([gray] * 3))
    assert np.array_equal(pixels(encode(Image.fromarray(RED).quantize(4))), RED)
    black_white = np.asarray(Image.fromarray(gray * 7).convert("1"))
    assert np.array_equal(pixels(encode(Image.fromarray(black_white)))[:, :, 0], black_white * 255)


def test_transparency_is_dropped_and_not_laid_on_a_colour():
    half = np.dstack([RED, np.full((5, 7), 10, np.uint8)])
    assert np.array_equal(pixels(encode(Image.fromarray(half, "RGBA"))), RED)
    palette = Image.fromarray(RED).quantize(4)
    assert np.array_equal(pixels(encode(palette, transparency=bytes([100, 100, 100, 255]))), RED)
    gray = np.full((5, 7), 90, np.uint8)
    assert (pixels(encode(Image.fromarray(np.dstack([gray, gray // 9]), "LA"))) == 90).all()


def test_sixteen_bits_keep_the_upper_eight():
    deep = (np.arange(35, dtype=np.uint16) * 1800).reshape(5, 7)
    for format in ("PNG", "TIFF"):
        found = pixels(encode(Image.fromarray(deep), format))
        assert np.array_equal(found, np.dstack([deep // 256] * 3))


def test_cmyk():
    cmyk = Image.fromarray(RED).convert("CMYK")
    assert abs(pixels(encode(cmyk, "JPEG", quality=95)).astype(int) - RED).max() < 6
    assert np.array_equal(pixels(encode(cmyk, "TIFF")), RED)


def test_the_orientation_is_not_looked_at():
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: to be turned by a quarter
    content = encode(Image.fromarray(RED), "JPEG", exif=exif)
    assert pixels(content).shape == (5, 7, 3)


def test_the_first_of_several_frames():
    content = encode(
        Image.fromarray(RED).quantize(4), "GIF", save_all=True, append_images=[Image.new("P", (7, 5))], loop=0
    )
    assert np.array_equal(pixels(content), RED)


def test_odd_metadata_is_no_reason_to_refuse_an_image():
    content = bytearray(encode(Image.fromarray(RED), "TIFF"))
    count = content.index(struct.pack("<H", 278)) + 4
    content[count] = 3  # numbers of rows per strip, where one is expected: Pillow warns, and warnings are errors here
    assert np.array_equal(pixels(bytes(content)), RED)


def test_one_pixel():
    assert pixels(encode(Image.fromarray(RED[:1, :1]))).tolist() == [[[200, 30, 40]]]


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"no image",
        encode(Image.fromarray(RED))[:-24],
        encode(Image.fromarray(RED), "JPEG")[:-100],
        encode(Image.new("F", (7, 5)), "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # which would start another program
    ],
)
def test_what_cannot_be_decoded_is_named(content):
    with pytest.raises(DataError, match=r"shard 3, row 5: cannot decode the image \(.*Copy or download"):
        decode(content, "shard 3, row 5")


@pytest.mark.parametrize("side", [40, 60])  # Pillow warns of the one and refuses the other
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    content = encode(Image.new("RGB", (side, side)))
    for read in (decode, image_size):
        with pytest.raises(DataError, match=r"bomb.*exceeds limit of|exceeds limit of .* bomb"):
            read(content, "it")


SOUND = [
    encode(Image.fromarray(RED), format, **options)
    for format, options in [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {})]
] + [encode(Image.fromarray(RED).quantize(4), "GIF"), encode(Image.fromarray(RED[:, :, 0].astype(np.uint16)))]


@given(st.data())
@settings(max_examples=300)
def test_damaged_bytes_give_an_image_or_our_error(data):
    content = bytearray(data.draw(st.sampled_from(SOUND)))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(DataError):  # and no other
        assert pixels(cut).shape[2] == 3


@given(st.binary(max_size=200), st.sampled_from([b"", *(content[:12] for content in SOUND)]))
@settings(max_examples=200)
def test_garbage_gives_our_error(garbage, begin):
    with pytest.raises(DataError, match=r"^it: cannot decode"):
        decode(begin + garbage, "it")
