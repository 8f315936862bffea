import hashlib
import itertools

import jaxtyping
import pytest
import torch

from shallowdeep.data import tensors
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.pytrees import map_tensors
from shallowdeep.data.samples import Augmentation, IndexedSamples
from shallowdeep.data.tensors import TensorSet
from shallowdeep.errors import ConfigError, DataError

X = torch.arange(20.0)[:, None] * torch.ones(1, 3)
Y = torch.arange(20) % 3
NESTED = {"a": X, "b": (X[:, 0], [X.long()])}


def gather(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def test_batches_keep_the_order():
    data = TensorSet(X, Y)
    assert isinstance(data, IndexedSamples)
    batches = list(data.batches(8))
    assert [len(batch.ids) for batch in batches] == [8, 8, 4]
    inputs, labels, ids = gather(batches)
    assert torch.equal(inputs, X)
    assert torch.equal(labels, Y)
    assert ids.tolist() == list(range(20))
    assert (len(data), data.num_classes, data.vocab_size, data.num_batches(8), data.num_batches(8, True)) == (
        20,
        3,
        0,
        3,
        2,
    )


def test_nested_inputs_stay_together():
    data = TensorSet(NESTED, Y)
    for batch in data.batches(7, seed=3):
        rows = batch.ids.float()
        assert torch.equal(batch.inputs["a"][:, 1], rows)
        assert torch.equal(batch.inputs["b"][0], rows)
        assert torch.equal(batch.inputs["b"][1][0][:, 2], batch.ids)
        assert torch.equal(batch.labels, batch.ids % 3)
    assert data.example_inputs["b"][0].tolist() == [0, 1, 2, 3]
    assert TensorSet(NESTED, Y).subset([5]).example_inputs["b"][0].tolist() == [5]


def test_a_seed_shuffles_without_the_global_random_state():
    data, before = TensorSet(X, Y), torch.get_rng_state()
    one, again, other = (gather(data.batches(7, seed=seed))[2].tolist() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one == again != other
    assert sorted(one) == list(range(20))
    assert one == gather(data.batches(20, seed=1))[2].tolist()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shards_hold_each_sample_once(number, drop_last):
    data = TensorSet(X, Y)
    whole = gather(data.batches(6, seed=1, drop_last=drop_last))
    shares = [list(data.batches(6, seed=1, drop_last=drop_last, shard=(rank, number))) for rank in range(number)]
    assert shares[0][0].ids.tolist() == whole[2][:6:number].tolist()
    assert all(len(batch.ids) for share in shares for batch in share)
    found = sorted(gather(itertools.chain(*shares))[2].tolist())
    assert found == sorted(whole[2].tolist())


def test_without_labels():
    data = TensorSet(X)
    (batch,) = data.batches(20)
    assert (batch.labels, data.num_classes, data.labels) == (None, 0, None)
    assert len(data.sample(5)) == 5
    assert data.subset([3, 1]).ids.tolist() == [3, 1]
    assert set(data.md5()) == {"inputs"}


def test_subset_sample_and_ids():
    data = TensorSet(X, torch.tensor([0] * 16 + [1] * 4), ids=torch.arange(100, 120), class_names=("a", "b"))
    part = data.subset([4, 1], split="val")
    assert (part.ids.tolist(), part.split, part.inputs[:, 0].tolist()) == ([104, 101], "val", [4, 1])
    assert (part.num_classes, part.class_names) == (2, ("a", "b"))
    assert data.sample(5, seed=4).labels.tolist() == [0, 0, 0, 0, 1]
    assert data.sample(20) is data
    with pytest.raises(DataError, match="no sample 20"):
        data.subset([20])
    with pytest.raises(DataError, match="id 102 is there twice"):
        data.subset([2, 2])


def test_to_moves_all_tensors(monkeypatch):
    monkeypatch.setattr(tensors, "check_labelled", lambda *parts, **others: None)  # this device has no values
    moved = TensorSet(NESTED, Y).to("meta")
    devices = set()
    map_tensors(lambda tensor: devices.add(tensor.device.type), (moved.inputs, moved.labels, moved.ids))
    assert devices == {"meta"}
    assert moved.device.type == "meta"


def test_channels_last_turns_images_alone():
    (batch,) = TensorSet((torch.rand(2, 3, 4, 4), torch.rand(2, 3))).batches(2, channels_last=True)
    assert batch.inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert batch.inputs[1].is_contiguous()


def test_md5_is_of_the_bytes():
    data = TensorSet(
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), torch.tensor([5, 6], dtype=torch.uint8)), Y[:2]
    )
    assert data.md5() == {
        "inputs": hashlib.md5(bytes([1, 2, 3, 4, 5, 6])).hexdigest(),
        "labels": hashlib.md5(bytes([0, 1])).hexdigest(),
    }
    assert TensorSet(X.bfloat16(), Y).md5() != TensorSet(X.half(), Y).md5()


def test_tensors_are_not_augmented():
    with pytest.raises(ConfigError, match="is for images; mine are tensors"):
        TensorSet(X, Y, name="mine").batches(4, augment=Augmentation(pad=1), seed=1)
    assert len(list(TensorSet(X, Y).batches(20, augment=Augmentation(), seed=1))) == 1
    with pytest.raises(ConfigError, match="batch of 0"):
        TensorSet(X, Y).batches(0)


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        (X, {"labels": Y[:19]}, r"rows.*\[19, 20\] rows|have \[19, 20\] rows"),
        ((X, X[:3]), {}, r"have \[3, 20\] rows"),
        ("words", {"labels": Y}, r"have \[20\] rows"),
        (X[:0], {}, r"have \[0\] rows"),
        (X, {"labels": Y.float()}, "labels are torch.float32"),
        (X, {"labels": -Y}, "label -2 has no class name"),
        (X, {"labels": Y, "num_classes": 2}, "label 2 has no class name: there are 2"),
        (X, {"labels": Y, "class_names": ("a", "b"), "num_classes": 3}, "2 names for 3 classes"),
        (X, {"ids": torch.arange(3)}, "3 ids for 20 samples"),
        (X, {"ids": torch.zeros(20).long()}, "id 0 is there twice"),
        (X, {"split": "dev"}, "no split 'dev'"),
        (X, {"labels": Y, "tree": LabelTree((0, 0), ("x", "y"), ("z",))}, "neither the label tree's 2 fine"),
    ],
)
def test_parts_must_fit(inputs, changes, message, monkeypatch):
    # as users run it: the suite's run-time check of annotations would speak first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(DataError, match=message):
        TensorSet(inputs, **changes)


def test_map_tensors_keeps_structures():
    from collections import namedtuple

    pair = namedtuple("pair", "first second")
    value = {"a": [torch.ones(1), "word"], "b": pair(torch.ones(2), None)}
    found = map_tensors(lambda tensor: len(tensor), value)
    assert found == {"a": [1, "word"], "b": pair(2, None)}
    assert isinstance(found["b"], pair)
