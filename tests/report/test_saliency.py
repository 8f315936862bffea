import base64
import io

import numpy as np
import pytest

from shallowdeep.analysis.gradcam import gradcam
from shallowdeep.errors import FileFormatError
from shallowdeep.report.gallery import images_of, make_galleries
from shallowdeep.report.saliency import make_views, tinted

PIL = pytest.importorskip("PIL.Image")


@pytest.mark.slow
def test_views_are_of_the_sample_and_of_what_its_exits_answered(digits):
    run = digits["joint"]
    test = run.trace("test")
    images = images_of(run, test)
    galleries = make_galleries(images, test)[1]
    views, sdn = make_views(run, images, test, galleries), run.load()
    assert set(views) == {picture.row for gallery in galleries for picture in gallery.pictures}
    row = max(views)
    place = images.ids.tolist().index(int(test.ids[row]))
    one = images.subset([place])
    for view, exit, name in zip(views[row], (0, -1), ("exit 0", "last"), strict=True):
        found = gradcam(sdn, next(iter(one.batches(1))).inputs, exit=exit)
        assert found.classes.item() == test.predictions[row, exit]
        assert (view.exit, view.answer) == (name, test.info.class_names[found.classes.item()])
        drawn = np.asarray(PIL.open(io.BytesIO(base64.b64decode(view.url.partition(",")[2]))))
        wanted = tinted(one.images[0], found.maps[0]).permute(1, 2, 0).numpy()
        assert np.abs(drawn.astype(int) - wanted).max() <= 1  # convolutions of other batch sizes round otherwise


def test_no_pictures_ask_for_no_network(digits):
    run = digits["joint"]
    assert make_views(run, images_of(run, run.trace("test")), run.trace("test"), ()) == {}


@pytest.mark.slow
def test_a_run_without_its_network_shows_images_alone(digits, make_run):
    """As an archive of Traces alone would be."""
    source = digits["joint"]
    test = source.trace("test")
    run = make_run("traces", config={"data": "digits"}, test=test, val=None, train=None)
    images = images_of(run, test)
    with pytest.raises(FileFormatError, match=r"sdn\.safetensors"):
        make_views(run, images, test, make_galleries(images, test)[1])
