from dataclasses import replace

import pytest
import torch
from reference import hand_trace

from shallowdeep.data.images import ImageSet
from shallowdeep.errors import DataError, UnknownName
from shallowdeep.explore.shelf import Shelf, check_recorded, group
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence


@pytest.fixture
def four():
    """The images of ``hand_trace``, in another order: ids 11, 2, 3, 7."""
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2).contiguous()
    return ImageSet(images, torch.tensor([1, 0, 1, 0]), torch.tensor([11, 2, 3, 7]), (0.0,), (1.0,), ("no", "yes"))


def test_groups_of_the_trace_worked_out_on_paper(four):
    trace = hand_trace()
    found = {one.key: one.ids for one in group(four, trace, replay(trace, Confidence(0.7)))}
    assert found == {
        "all": (11, 2, 3, 7),
        "destroyed": (11,),
        "first-0": (7, 11),
        "first-1": (3,),
        "first-2": (),
        "never": (2,),
        "leaves-0": (7, 2),
        "leaves-1": (3, 11),
    }


def test_without_labels_or_a_trace_less_is_known(four):
    trace = replace(hand_trace(), labels=None)
    assert [one.key for one in group(four, trace, replay(trace, Confidence(2.0)))] == ["all", "leaves-2"]
    assert [one.key for one in group(four, None, None)] == ["all"]


def test_a_page_of_a_group(four):
    trace = hand_trace()
    shelf = Shelf(four, group(four, trace, None), ("no", "yes"))
    shown = shelf.show("all", 1, 2)
    assert (shown["total"], shown["start"]) == (4, 1)
    assert [(one["id"], one["label"]) for one in shown["samples"]] == [(2, "no"), (3, "yes")]
    assert all(one["image"].startswith("data:image/png;base64,") for one in shown["samples"])
    assert int(shelf.pixels(3)[0, 0, 0]) == 2
    assert shelf.show("never", 5, 2)["samples"] == []


def test_what_is_not_there_is_refused_in_words(four):
    shelf = Shelf(four, group(four, None, None), ("no", "yes"))
    with pytest.raises(DataError, match="no sample 5"):
        shelf.pixels(5)
    with pytest.raises(UnknownName, match="no group of samples 'al'"):
        shelf.show("al", 0, 4)


def test_a_trace_of_other_samples_is_noticed(four):
    assert check_recorded(four, hand_trace()) is not None
    with pytest.raises(DataError, match="Record it anew"):
        check_recorded(four.subset([0, 1, 2]), hand_trace())
