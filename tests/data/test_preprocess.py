import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.samples import Augmentation
from shallowdeep.errors import ConfigError


def make_picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def channels_first(picture):
    return np.asarray(picture).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [  # by hand, as torchvision's Resize(40) and CenterCrop(32)
        ((80, 80), (40, 40), (4, 4, 36, 36)),
        ((100, 50), (80, 40), (24, 4, 56, 36)),
        ((50, 101), (40, 80), (4, 24, 36, 56)),
        ((20, 10), (80, 40), (24, 4, 56, 36)),
        ((67, 60), (44, 40), (6, 4, 38, 36)),
        ((71, 60), (47, 40), (8, 4, 40, 36)),  # 7.5 columns to leave out: Python rounds to the even number
    ],
)
@pytest.mark.parametrize("way", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_middle_of_the_resized_image(size, resized, box, way):
    picture = make_picture(*size)
    expected = picture.resize(resized, Image.Resampling[way.upper()]).crop(box)
    found = Preprocessing(image_size=32, crop_share=0.8, interpolation=way).apply(picture)
    assert np.array_equal(found, channels_first(expected))


def test_squash_resizes_both_sides_alike():
    picture = make_picture(60, 30)
    plain = Preprocessing(image_size=20, crop_share=1.0, squash=True).apply(picture)
    assert np.array_equal(plain, channels_first(picture.resize((20, 20), Image.Resampling.BILINEAR)))
    cut = Preprocessing(image_size=20, crop_share=0.5, squash=True).apply(picture)
    expected = picture.resize((40, 40), Image.Resampling.BILINEAR).crop((10, 10, 30, 30))
    assert np.array_equal(cut, channels_first(expected))


def test_an_image_of_that_size_is_left_alone():
    picture = make_picture(32, 32)
    assert np.array_equal(Preprocessing(image_size=32, crop_share=1.0).apply(picture), channels_first(picture))


@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
@settings(max_examples=40)
def test_every_size_becomes_the_square(width, height, squash):
    preprocessing = Preprocessing(image_size=9, crop_share=0.7, squash=squash)
    assert preprocessing.apply(make_picture(width, height)).shape == (3, 9, 9)
    random = np.random.default_rng(0)
    found = preprocessing.apply_randomly(make_picture(width, height), Augmentation(2, True, 0.3), random)
    assert found.shape == (3, 9, 9)


def test_a_ribbon_does_not_fill_the_memory(monkeypatch):
    # resized with its length kept it would be 224 x 14 million pixels
    asked, really = [], Preprocessing._resize
    monkeypatch.setattr(Preprocessing, "_resize", lambda self, i, size: asked.append(size) or really(self, i, size))
    for picture in (Image.new("RGB", (1, 65_000), (5, 6, 7)), Image.new("RGB", (65_000, 1), (5, 6, 7))):
        found = Preprocessing(image_size=9, crop_share=1.0).apply(picture)
        assert found[:, 4, 4].tolist() == [5, 6, 7]
    assert asked == [(9, 144), (144, 9)]


def test_a_long_image_keeps_its_middle():
    picture = make_picture(2, 100)
    found = Preprocessing(image_size=2, crop_share=1.0).apply(picture)
    assert np.array_equal(found, channels_first(picture.crop((0, 49, 2, 51))))


@pytest.mark.parametrize(("size", "share", "side"), [(224, 0.875, 256), (224, 0.9, 248), (160, 160 / 232, 232)])
def test_the_resized_side_is_timms(size, share, side):
    assert Preprocessing(image_size=size, crop_share=share).resized == side


def find_window(found, picture, size):
    """Whether ``found`` is a whole window of the picture, resized; its area and proportions."""
    width, height = picture.size
    for w in range(1, width + 1):
        for h in range(1, height + 1):
            for left in range(width - w + 1):
                for top in range(height - h + 1):
                    window = picture.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.NEAREST)
                    if np.array_equal(channels_first(window), found):
                        yield w * h / (width * height), w / h


def test_random_windows_are_windows_of_the_original():
    picture, random = make_picture(7, 6), np.random.default_rng(3)
    preprocessing = Preprocessing(image_size=12, interpolation="nearest")
    areas = set()
    for _ in range(25):
        found = preprocessing.apply_randomly(picture, Augmentation(min_area=0.3), random)
        windows = list(find_window(found, picture, 12))
        assert windows  # else it is none
        # whole pixels miss the asked area and the proportions 3:4 to 4:3 by less than a pixel of each side
        assert any(area > 0.2 and 0.5 <= ratio <= 2 for area, ratio in windows)
        areas.add(windows[0][0])
    assert len(areas) > 5


def test_the_window_of_an_image_too_long_is_its_middle():
    picture = make_picture(100, 10)
    found = Preprocessing(image_size=10, interpolation="nearest").apply_randomly(
        picture, Augmentation(min_area=0.99), np.random.default_rng(0)
    )
    expected = picture.crop((43, 0, 56, 10)).resize((10, 10), Image.Resampling.NEAREST)  # 13 by 10, as 4:3
    assert np.array_equal(found, channels_first(expected))


def test_shifts_and_flips_of_the_square():
    picture, random, pad, size = make_picture(4, 4), np.random.default_rng(0), 1, 4
    preprocessing, seen = Preprocessing(image_size=4, crop_share=1.0), set()
    padded = {
        flip: np.pad(channels_first(picture)[:, :, :: -1 if flip else 1], ((0, 0), (pad, pad), (pad, pad)))
        for flip in (False, True)
    }
    known = {
        image[:, top : top + size, left : left + size].tobytes(): (flip, top, left)
        for flip, image in padded.items()
        for top in range(3)
        for left in range(3)
    }
    for _ in range(200):
        found = preprocessing.apply_randomly(picture, Augmentation(pad, True), random)
        seen.add(known[found.tobytes()])  # a KeyError: no such crop
    assert len(seen) == 18


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "resize to 0"),
        ({"crop_share": 0.0}, "crop_share is 0.0"),
        ({"crop_share": 1.1}, "crop_share is 1.1"),
        ({"interpolation": "area"}, "no interpolation 'area'"),
        ({"mean": (0.5,)}, "give three of each"),
        ({"std": (0.5, 0.5, 0.0)}, "every std above 0"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**values)


@pytest.mark.parametrize("area", [0.0, 1.5])
def test_a_share_of_the_area(area):
    with pytest.raises(ConfigError, match=f"at least {area} of an image"):
        Augmentation(min_area=area)


TIMM = {  # of vit_tiny_patch16_224.augreg_in21k_ft_in1k
    "input_size": (3, 224, 224),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "crop_mode": "center",
    "num_classes": 1000,
}


def test_from_timm():
    found = Preprocessing.from_timm(TIMM)
    assert found == Preprocessing(224, (0.5,) * 3, (0.5,) * 3, 0.9, "bicubic")
    assert Preprocessing.from_timm({}) == Preprocessing()
    assert Preprocessing.from_timm(TIMM | {"crop_mode": "squash", "crop_pct": 1.0}).squash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (1, 28, 28)}, r"input_size is \(1, 28, 28\)"),
        ({"input_size": (3, 224, 192)}, "Only colour squares"),
        ({"crop_mode": "border"}, "crop_mode is 'border'"),
        ({"interpolation": "random"}, "no interpolation 'random'"),
    ],
)
def test_from_timm_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing.from_timm(TIMM | change)


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# as preprocessor_config.json has them: google/vit-base, openai/clip-vit, facebook/convnext, facebook/deit
VIT = {"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, "rescale_factor": 1 / 255}
CLIP = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
CONVNEXT = {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}
DEIT = {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VIT | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (224, 224, True, "bilinear", 0.5, 0.5)),
        (CLIP | IMAGENET | {"resample": 3}, (224, 256, False, "bicubic", 0.485, 0.229)),
        (CONVNEXT | IMAGENET, (224, 256, False, "bicubic", 0.485, 0.229)),
        (CONVNEXT | IMAGENET | {"size": {"shortest_edge": 384}}, (384, 384, True, "bicubic", 0.485, 0.229)),
        (DEIT | IMAGENET, (224, 256, True, "bilinear", 0.485, 0.229)),
        ({"size": 192, "resample": 0, "do_normalize": False}, (192, 192, True, "nearest", 0.0, 1.0)),
    ],
)
def test_from_hf(config, expected):
    found = Preprocessing.from_hf(config)
    size, resized, squash, way, mean, std = expected
    assert (found.image_size, found.resized, found.squash, found.interpolation) == (size, resized, squash, way)
    assert (math.isclose(found.mean[0], mean), math.isclose(found.std[0], std)) == (True, True)


def test_from_hf_takes_a_processor():
    class Processor:
        def to_dict(self):
            return VIT

    assert Preprocessing.from_hf(Processor()).image_size == 224


@pytest.mark.parametrize(
    "config",
    [
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    ],
)
def test_from_hf_keeps_the_scale_of_the_pixels(config):
    found = Preprocessing.from_hf(VIT | config)
    for pixel in (0, 51, 255):
        scaled = pixel * (config.get("rescale_factor", 1.0))
        wanted = (scaled - config["image_mean"][0]) / config["image_std"][0]
        assert math.isclose((pixel / 255 - found.mean[0]) / found.std[0], wanted, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VIT | {"do_resize": False}, "does not resize"),
        ({"size": {"height": 224, "width": 192}}, "Only a shortest edge or a square"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "Only a shortest edge"),
        ({"size": {"shortest_edge": 224}}, "crops nothing"),
        (CLIP | {"crop_size": 300}, "crops 300 pixels out of 256"),
        (VIT | {"resample": 4}, "resample is 4"),
        ({}, "size is None"),
    ],
)
def test_from_hf_refuses(config, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing.from_hf(config)
