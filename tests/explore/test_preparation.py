import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from shallowdeep.config import load_config
from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.files.stores import FileStore
from shallowdeep.data.images import ImageSet
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.sources import load_data
from shallowdeep.errors import DataError, NetworkError
from shallowdeep.explore.preparation import Preparation, prepare_without_data
from shallowdeep.explore.uploads import read_upload
from shallowdeep.networks.zoo import load_network
from shallowdeep.runs.run import Run


def as_png(pixels):
    """A file's bytes, of pixels (c, h, w)."""
    array = pixels.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG")
    return file.getvalue()


def held(channels, height=7, width=9):
    """Three images of noise, held decoded."""
    images = torch.randint(256, (3, channels, height, width), generator=torch.Generator().manual_seed(1))
    spread = (0.1, 0.2, 0.3)[:channels]
    return ImageSet(images.to(torch.uint8), torch.arange(3), torch.arange(3), spread, spread, ("a", "b", "c"))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_saved_and_sent_is_the_image_that_was_recorded(channels):
    samples = held(channels)
    preparation = Preparation.of(samples)
    for row, wanted in enumerate(next(samples.batches(3)).inputs):
        pixels = preparation.pixels(read_upload(as_png(samples.images[row])))
        assert torch.equal(pixels, samples.images[row])
        assert torch.equal(preparation.inputs(pixels), wanted[None])


def test_so_is_one_that_is_decoded_as_needed(tmp_path):
    for number, size in enumerate([(40, 30), (25, 60)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    paths = tuple(tmp_path / f"{number}.png" for number in range(2))
    shape = Preprocessing(image_size=16, mean=(0.1, 0.2, 0.3), crop_share=0.9, interpolation="bicubic")
    samples = EncodedImages(FileStore(paths), torch.arange(2), torch.arange(2), shape, ("a", "b"), num_workers=0)
    preparation = Preparation.of(samples)
    for path, wanted in zip(paths, next(samples.batches(2)).inputs, strict=True):
        pixels = preparation.pixels(read_upload(path.read_bytes()))
        assert torch.equal(preparation.inputs(pixels), wanted[None])


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (31, 77)])
def test_any_size_is_made_to_fit(size):
    preparation = Preparation.of(held(3))
    image = Image.new("RGB", size, (10, 20, 30))
    assert torch.equal(
        preparation.pixels(image), torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 7, 9)
    )
    assert preparation.blank.shape == (3, 7, 9)


def test_the_middle_is_kept_and_nothing_is_stretched():
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    pixels = Preparation((3, 10, 10), (0.0,) * 3, (1.0,) * 3).pixels(image)
    assert bool((pixels[:, :, 1:-1] == 255).all())
    assert int(pixels.min()) > 200  # at the edge a little of what was cut away


def test_other_channels_are_refused():
    with pytest.raises(DataError, match="images of 4 channels"):
        Preparation((4, 8, 8), (0.0,) * 4, (1.0,) * 4)


def test_without_the_data_the_preparation_is_the_same(tmp_path):
    net = load_network("resnet20", num_classes=10, image_size=32)
    run = Run(tmp_path, load_config(changes={"data": "digits", "network": "resnet20"}))
    assert prepare_without_data(run, net) == Preparation.of(load_data("digits").test)


def test_a_large_network_s_images_are_cropped_as_its_data_would_be(tmp_path):
    net = torch.nn.Flatten()
    net.config = SimpleNamespace(image_size=224, num_channels=3)
    run = Run(tmp_path, load_config(changes={"data": "folder:/nowhere", "network": "resnet20"}))
    shape = Preprocessing()
    wanted = Preparation((3, 224, 224), shape.mean, shape.std, shape)
    assert prepare_without_data(run, net) == wanted


def test_a_library_s_own_preparation_goes_first(tmp_path):
    net = torch.nn.Flatten()
    net.shallowdeep_preprocessing = shape = Preprocessing(image_size=160, crop_share=0.95)
    config = {"data": "folder:/nowhere", "network": "timm:resnet18", "network_options": {"pretrained": True}}
    run = Run(tmp_path, load_config(changes=config))
    assert prepare_without_data(run, net) == Preparation((3, 160, 160), shape.mean, shape.std, shape)


def test_where_nothing_tells_the_size_that_is_said(tmp_path):
    run = Run(tmp_path, load_config(changes={"data": "folder:/nowhere"}))
    with pytest.raises(NetworkError, match="cannot tell what inputs"):
        prepare_without_data(run, torch.nn.Flatten())
