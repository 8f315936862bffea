import pytest
import torch

from shallowdeep.data.labels import LabelTree
from shallowdeep.errors import DataError

FINE, COARSE = ("oak", "cat", "dog", "elm"), ("plant", "animal")
TREE = LabelTree((0, 1, 1, 0), FINE, COARSE)


def test_from_pairs_reads_each_childs_parent():
    fine, coarse = torch.tensor([2, 0, 3, 1, 2]), torch.tensor([1, 0, 0, 1, 1])
    tree = LabelTree.from_pairs(fine, coarse, FINE, COARSE)
    assert tree == TREE
    assert (tree.num_fine, tree.num_coarse) == (4, 2)


def test_coarsen_keeps_the_shape():
    assert TREE.coarsen(torch.tensor([[3, 2], [1, 0]])).tolist() == [[0, 1], [1, 0]]


def test_pool_sums_the_children():
    probs = torch.tensor([[0.5, 0.125, 0.25, 0.125], [0.0, 1.0, 0.0, 0.0]])
    assert TREE.pool(probs).tolist() == [[0.625, 0.375], [0.0, 1.0]]


def test_pool_with_families_of_different_size():
    tree = LabelTree((1, 1, 1, 0), FINE, COARSE)
    assert tree.pool(torch.tensor([[0.5, 0.25, 0.125, 0.125]])).tolist() == [[0.125, 0.875]]


def test_pool_refuses_other_columns():
    with pytest.raises(DataError, match="4 fine labels, the probabilities have 2 columns"):
        TREE.pool(torch.zeros(1, 2))


def test_from_pairs_refuses_two_parents():
    with pytest.raises(DataError, match="fine label 1 comes with the coarse labels 0 and 1"):
        LabelTree.from_pairs(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), FINE[:2], COARSE)


@pytest.mark.parametrize(("names", "message"), [(FINE, "3 is on no sample"), (FINE[:2], "2 is not named")])
def test_from_pairs_wants_every_fine_label_named_and_present(names, message):
    with pytest.raises(DataError, match=message):
        LabelTree.from_pairs(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), names, COARSE)


def test_the_parts_must_agree():
    with pytest.raises(DataError, match="3 parents and 4 fine names"):
        LabelTree((0, 1, 1), FINE, COARSE)
    with pytest.raises(DataError, match="2 is no coarse label"):
        LabelTree((0, 1, 2, 0), FINE, COARSE)


def test_dict_round_trip():
    assert TREE.to_dict() == {
        "parents": [0, 1, 1, 0],
        "fine_names": ["oak", "cat", "dog", "elm"],
        "coarse_names": ["plant", "animal"],
    }
    assert LabelTree.from_dict(TREE.to_dict()) == TREE
    with pytest.raises(DataError, match="lacks 'fine_names'"):
        LabelTree.from_dict({"parents": [0]})
