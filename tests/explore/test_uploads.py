import io

import pytest
from PIL import Image

from shallowdeep.explore import uploads
from shallowdeep.explore.uploads import Refused, kind_of, read_upload


def encoded(kind="PNG", size=(5, 3), mode="RGB", colour=(200, 10, 60), **more):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **more)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "name"), [("PNG", "PNG"), ("JPEG", "JPEG"), ("GIF", "GIF"), ("BMP", "BMP"), ("WEBP", "WebP")]
)
def test_formats_that_are_read(kind, name):
    content = encoded(kind)
    assert kind_of(content) == name
    image = read_upload(content)
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert image.getpixel((2, 1)) == pytest.approx((200, 10, 60), abs=8)  # JPEG and WebP lose a little


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert read_upload(file.getvalue()).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 422, "The file is empty. Choose an image."),
        (b"just some words", 415, "no PNG, JPEG, WebP, GIF or BMP image, whatever its name says"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "Choose an image file"),
        (encoded("TIFF"), 415, "save it as one of these"),
        (encoded()[:50], 422, "This PNG image cannot be read"),
        (b"\xff\xd8\xff" + 200 * b"x", 422, "Copy or download it again"),
        (b"BM" + bytes(60), 422, "This BMP image cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_in_words(content, status, words):
    with pytest.raises(Refused) as caught:
        read_upload(content)
    assert caught.value.status == status
    assert words in str(caught.value)


def test_a_small_file_with_many_pixels_is_not_decoded(monkeypatch):
    bomb = encoded(size=(8000, 7000), mode="1", colour=0)
    assert len(bomb) < 100_000
    monkeypatch.setattr(uploads, "decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(Refused, match="8,000 × 7,000 pixels; at most 50 million are read") as caught:
        read_upload(bomb)
    assert caught.value.status == 413


def test_a_bomb_beyond_the_decoder_s_own_limit_is_refused():
    with pytest.raises(Refused, match="too large") as caught:
        read_upload(encoded(size=(10_000, 9_000), mode="1", colour=0))
    assert caught.value.status == 422
