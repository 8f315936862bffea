import base64
import io
from dataclasses import replace

import pytest
import torch
from reference import hand_trace

from shallowdeep.config import load_config
from shallowdeep.data.images import ImageSet
from shallowdeep.data.samples import Splits
from shallowdeep.errors import DataError
from shallowdeep.report.gallery import by_class, images_of, make_galleries, png_url
from shallowdeep.runs.run import Run
from shallowdeep.traces.trace import TraceInfo

PIL = pytest.importorskip("PIL.Image")
NAMES = ("cat", "dog")


class RunOnImages(Run):
    """A run whose data are given."""

    def __init__(self, folder, images):
        super().__init__(folder, load_config())
        self.images = images

    def load_data(self, net=None):
        return Splits(self.images, test=self.images)


@pytest.fixture
def trace():
    return replace(hand_trace(split="test"), info=TraceInfo(split="test", class_names=NAMES))


@pytest.fixture
def images(trace):
    """Its images lie in another order than the Trace, and have one grey value each, their id's."""
    order = trace.ids.argsort()
    pixels = trace.ids[order].to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return ImageSet(pixels, trace.labels[order], trace.ids[order], (0.5,) * 3, (0.5,) * 3, NAMES, "given", "test")


def grey(picture):
    """The value of an image's pixels."""
    data = base64.b64decode(picture.url.removeprefix("data:image/png;base64,"))
    return PIL.open(io.BytesIO(data)).getpixel((0, 0))[0]


def test_each_sample_is_where_it_belongs_with_its_own_image(trace, images):
    """From the table above ``hand_trace``, by ids: 7 always right, 3 from exit 1 on, 11 at exit 0 only, 2 never."""
    simple, lost = make_galleries(images, trace)
    assert [[picture.id for picture in gallery.pictures] for gallery in simple] == [[7, 11], [3], []]
    assert [[picture.id for picture in gallery.pictures] for gallery in lost] == [[11], [], []]
    shown = [picture for gallery in (*simple, *lost) for picture in gallery.pictures]
    assert all(grey(picture) == picture.id for picture in shown)
    eleven = lost[0].pictures[0]
    assert (eleven.label, eleven.answers) == ("dog", ("dog", "cat", "cat"))
    assert eleven.confidences == pytest.approx((0.65, 0.70, 0.55))


def test_images_of_other_data_are_refused(trace, images, tmp_path):
    assert images_of(RunOnImages(tmp_path, images), trace) is images
    with pytest.raises(DataError, match="not the data that"):
        images_of(RunOnImages(tmp_path, replace(images, labels=1 - images.labels)), trace)
    with pytest.raises(DataError, match="not the data that"):
        images_of(RunOnImages(tmp_path, images.subset([0, 1, 2])), trace)
    with pytest.raises(DataError, match="2 channels are not shown"):
        images_of(
            RunOnImages(tmp_path, replace(images, images=images.images[:, :2], mean=(0.5,) * 2, std=(0.5,) * 2)), trace
        )


def test_classes_come_the_most_destructive_first(trace):
    cat, dog = sorted(by_class(trace), key=lambda line: line.name)
    assert [line.name for line in by_class(trace)] == ["dog", "cat"]
    assert (dog.found.n, dog.found.destructive, cat.found.destructive) == (2, 0.5, 0.0)


def test_large_images_are_made_smaller_and_grey_ones_stay_grey():
    url = png_url(torch.arange(200 * 100).remainder(256).to(torch.uint8).view(1, 200, 100))
    image = PIL.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (image.size, image.mode) == ((48, 96), "L")
