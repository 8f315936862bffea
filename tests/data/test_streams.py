import itertools
from collections import UserDict

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from shallowdeep.data.samples import Augmentation, Samples, Splits
from shallowdeep.data.streams import Stream, as_samples, as_splits
from shallowdeep.errors import ConfigError, DataError


def make_batches(sizes=(4, 4, 2), classes=3):
    """Batches whose inputs are the running number of each sample."""
    numbers = torch.arange(sum(sizes)).split(list(sizes))
    return [(part[:, None].float() * torch.ones(1, 2), part % classes) for part in numbers]


def gather(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def loader(n=10, batch_size=4, **options):
    return DataLoader(TensorDataset(torch.arange(n)[:, None].float(), torch.arange(n) % 3), batch_size, **options)


class Counting(IterableDataset):
    """An endless data set."""

    def __iter__(self):
        return ((torch.tensor([float(number)]), number % 3) for number in itertools.count())


class CountingSquares(torch.utils.data.Dataset):
    """A map-style data set that draws a random number for each sample."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return torch.rand(2), row % 3


@pytest.mark.parametrize("source", [make_batches(), tuple(make_batches()), lambda: iter(make_batches())])
def test_batches_come_as_their_source_makes_them(source):
    stream = Stream(source, num_classes=3)
    for _ in range(2):  # a second pass is as good as the first
        batches = list(stream.batches(128))
        assert [len(batch.ids) for batch in batches] == [4, 4, 2]
        inputs, labels, ids = gather(batches)
        assert inputs[:, 1].tolist() == list(range(10))
        assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
        assert ids.tolist() == list(range(10))
        assert (labels.dtype, ids.dtype) == (torch.int64, torch.int64)


X, Y = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("batch", "inputs", "labels", "ids"),
    [
        ((X, Y), X, [1, 0], [0, 1]),
        ([X, Y], X, [1, 0], [0, 1]),
        ((X, Y.to(torch.uint8), torch.tensor([7, 5])), X, [1, 0], [7, 5]),
        ((X, [1, 0], [7, 5]), X, [1, 0], [7, 5]),
        ((X, None), X, None, [0, 1]),
        ([X], X, None, [0, 1]),
        (X, X, None, [0, 1]),
        (((X, Y), Y), (X, Y), [1, 0], [0, 1]),
        ({"a": X, "labels": Y}, {"a": X}, [1, 0], [0, 1]),
        (UserDict(a=X, label=Y), {"a": X}, [1, 0], [0, 1]),
        ({"a": X, "b": Y}, {"a": X, "b": Y}, None, [0, 1]),
        ((X.numpy(), Y.numpy()), X, [1, 0], [0, 1]),
        (({"a": X, "flag": True}, Y), {"a": X, "flag": True}, [1, 0], [0, 1]),
        ((X, torch.tensor(0.5)), None, None, None),
    ],
)
def test_the_forms_of_a_batch(batch, inputs, labels, ids):
    if inputs is None:
        with pytest.raises(DataError, match=r"batch 0 of stream: the labels are torch.float32 of shape \(\)"):
            next(Stream([batch]).batches(2))
        return
    (found,) = Stream([batch]).batches(2)
    torch.testing.assert_close(found.inputs, inputs)
    assert (None if found.labels is None else found.labels.tolist()) == labels
    assert found.ids.tolist() == ids


def test_a_mapping_is_not_changed():
    batch = {"a": X, "labels": Y}
    list(Stream([batch]).batches(2))
    assert set(batch) == {"a", "labels"}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y, Y, Y), "has 4 parts"),
        ((), "has 0 parts"),
        ((X, torch.tensor([0.0, 1.0])), "labels are torch.float32"),
        ((X, torch.tensor([True, False])), "labels are torch.bool"),
        ((X, Y[:, None]), r"labels are torch.int64 of shape \(2, 1\)"),
        ((X, "ab"), "labels are a str"),
        ((X, torch.tensor([0, 3])), "no label 3: there are 3 classes"),
        ((X, torch.tensor([-1, 0])), "no label -1"),
        ((X, Y[:1]), "inputs have 2 rows, labels 1, ids none"),
        ((X, Y, Y[:1]), "inputs have 2 rows, labels 2, ids 1"),
        (((X, X[:1]), Y), "inputs have 1 and 2 rows, labels 2"),
        (("words", Y), "inputs hold no tensor"),
        ({"labels": Y}, "inputs hold no tensor"),
        ("words", "inputs hold no tensor"),
    ],
)
def test_what_is_no_batch_is_named_by_its_number(batch, message):
    with pytest.raises(DataError, match=f"batch 1 of mine.*{message}"):
        list(Stream([(X, Y), batch], num_classes=3, name="mine").batches(2))


def test_labels_are_not_negative_where_their_number_is_unknown():
    with pytest.raises(DataError, match="no label -100: labels are counted from 0"):
        list(Stream([(X, torch.tensor([0, -100]))]).batches(2))


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_shards_hold_each_sample_once(number):
    stream = Stream(make_batches(), num_classes=3)
    whole = gather(stream.batches(4))
    shares = [list(stream.batches(4, shard=(rank, number))) for rank in range(number)]
    assert all(len(batch.ids) for share in shares for batch in share)
    together = gather(itertools.chain(*shares))
    order = together[2].argsort()
    assert all(torch.equal(a[order], b) for a, b in zip(together, whole, strict=True))
    assert shares[0][0].ids.tolist() == list(range(0, 4, number))


def test_in_training_all_processes_take_equally_many_steps():
    stream = Stream(make_batches((4, 4, 2)))
    steps = [len(list(stream.batches(4, shard=(rank, 3), drop_last=True))) for rank in range(3)]
    assert steps == [2, 2, 2]  # the batch of two rows would be none for the third process
    assert len(list(stream.batches(4, shard=(1, 2), drop_last=True))) == 3
    assert len(list(stream.batches(4, drop_last=True))) == 3


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=30)
def test_laws_of_shards(sizes, number):
    stream = Stream(make_batches(sizes))
    found = sorted(
        i for rank in range(number) for batch in stream.batches(1, shard=(rank, number)) for i in batch.ids.tolist()
    )
    assert found == list(range(sum(sizes)))


def test_a_seed_shuffles_a_loader_and_leaves_the_random_state():
    stream = Stream(loader(50, shuffle=True))
    before = torch.get_rng_state()
    one, again, other = (gather(stream.batches(4, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0])
    torch.manual_seed(1)
    assert torch.equal(one[0], torch.cat([batch[0] for batch in loader(50, shuffle=True)]))  # as PyTorch itself


def test_the_order_is_the_same_in_every_process_whatever_else_is_drawn():
    stream = Stream(loader(20, shuffle=True))
    shares = []
    for rank in range(2):
        torch.manual_seed(rank)  # as dropout of two processes would have it
        shares += [batch.inputs for batch in stream.batches(4, seed=5, shard=(rank, 2))]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == list(range(20))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_seed_reaches_the_workers():
    stream = Stream(DataLoader(CountingSquares(), 4, num_workers=2))
    one, again, other = (gather(stream.batches(4, seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_an_exhausted_iterator_is_an_error_with_a_way_out():
    stream = Stream(iter(make_batches()))
    assert len(list(stream.batches(4))) == 3
    with pytest.raises(DataError, match=r"gave no batch\. Give something that can be iterated again: a DataLoader"):
        next(stream.batches(4))
    with pytest.raises(DataError, match="gave no batch"):
        next(Stream([]).batches(4))
    with pytest.raises(DataError, match="gave a NoneType"):
        next(Stream(lambda: None).batches(4))


def test_a_look_at_the_inputs_takes_nothing_away():
    stream = Stream(lambda: iter(make_batches()))
    assert stream.example_inputs[:, 0].tolist() == [0, 1, 2, 3]
    assert len(list(stream.batches(4))) == 3
    assert Stream(make_batches((2, 2))).example_inputs.shape == (2, 2)
    assert Stream([((X, {"a": X}), Y)] * 2).example_inputs[1]["a"].tolist() == [[1.0], [2.0]]
    once = Stream(iter(make_batches()))
    with pytest.raises(DataError, match="would lose it"):
        _ = once.example_inputs
    assert len(list(once.batches(4))) == 3


def test_a_look_at_the_inputs_leaves_the_random_state():
    stream, before = Stream(loader(shuffle=True)), torch.get_rng_state()
    assert torch.equal(stream.example_inputs, stream.example_inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_number_of_batches():
    assert Stream(make_batches()).num_batches(128) == 3
    assert Stream(loader(10)).num_batches(128, drop_last=True) == 3
    assert Stream(lambda: iter(make_batches()), num_batches=3).num_batches(1) == 3
    for endless in (lambda: iter(make_batches()), DataLoader(Counting(), 4)):
        with pytest.raises(ConfigError, match=r"has no length.*num_batches="):
            Stream(endless).num_batches(1)


def test_a_given_number_of_batches_is_a_pass():
    endless = Stream(DataLoader(Counting(), 4), num_batches=3)
    assert gather(endless.batches(1))[0][:, 0].tolist() == list(range(12))
    short = Stream(make_batches(), num_batches=4)
    with pytest.raises(DataError, match="ended after 3 of 4 batches"):
        list(short.batches(1))
    with pytest.raises(ConfigError, match="pass of 0 batches"):
        Stream(make_batches(), num_batches=0)


@pytest.mark.parametrize(
    ("source", "options", "count"),
    [
        (make_batches(), {}, 10),
        (make_batches(), {"num_batches": 2}, 8),
        (loader(10), {}, 10),
        (loader(10, drop_last=True), {}, 8),
        (loader(10), {"num_batches": 2}, 8),
        (loader(10, sampler=[3, 1, 2]), {}, 3),
    ],
)
def test_the_number_of_samples(source, options, count):
    stream = Stream(source, **options)
    assert len(stream) == count == len(gather(stream.batches(1))[2])


@pytest.mark.parametrize(
    "source", [lambda: iter(make_batches()), DataLoader(Counting(), 4), loader(3, batch_size=None)]
)
def test_a_number_of_samples_that_nobody_knows(source):
    with pytest.raises(ConfigError, match="not known before they are counted"):
        len(Stream(source))


def test_to_moves_batches_and_leaves_the_stream():
    stream = Stream([((X, {"a": X}), Y, Y)])
    moved = stream.to("meta")
    (batch,) = moved.batches(1)
    assert {x.device.type for x in (batch.inputs[0], batch.inputs[1]["a"], batch.labels, batch.ids)} == {"meta"}
    assert next(stream.batches(1)).ids.device.type == "cpu"
    assert moved.example_inputs[0].device.type == "meta"
    assert (moved.source is stream.source, moved.name) == (True, "stream")


def test_channels_last_turns_images_alone():
    images, bytes_, flat = torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.rand(2, 3)
    (batch,) = Stream([((images, bytes_, flat), Y)]).batches(2, channels_last=True)
    assert batch.inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert batch.inputs[1].is_contiguous()
    assert torch.equal(batch.inputs[0], images)
    assert batch.inputs[2].is_contiguous()


def test_settings_that_the_source_decides():
    with pytest.warns(UserWarning, match=r"Augmentation\(pad=2.* is left out"):
        Stream(make_batches()).batches(1, augment=Augmentation(pad=2), seed=1)
    Stream(make_batches()).batches(1, augment=Augmentation(), seed=1)
    with pytest.raises(ConfigError, match="rank must be from 0 to 1"):
        Stream(make_batches()).batches(1, shard=(2, 2))


def test_a_loader_that_shares_out_by_itself():
    data = TensorDataset(X, Y)
    stream = Stream(DataLoader(data, 1, sampler=DistributedSampler(data, num_replicas=2, rank=0)))
    with pytest.raises(ConfigError, match=r"DistributedSampler.* 2 processes"):
        stream.batches(1, shard=(0, 2))
    assert len(list(stream.batches(1))) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TensorDataset(X, Y), r"TensorDataset gives single samples. Wrap it: DataLoader\("),
        (X, r"tensors are no batches. Hold them in TensorSet"),
        ((X, Y), "tensors are no batches"),
        (np.zeros(3), "tensors are no batches"),
        ("cifar10", "a str is no stream"),
        ({"train": []}, "a dict is no stream"),
        (3, "a int is no stream"),
    ],
)
def test_what_is_no_stream(source, message, monkeypatch):
    # as users run it: the suite's run-time check of annotations would speak first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(DataError, match=message):
        Stream(source)


def test_names_of_classes_and_splits():
    stream = Stream([], class_names=("a", "b"), split="val")
    assert (stream.num_classes, stream.class_names, stream.split, stream.tree) == (2, ("a", "b"), "val", None)
    assert Stream([]).num_classes == 0
    with pytest.raises(ConfigError, match="2 class names for 3 classes"):
        Stream([], class_names=("a", "b"), num_classes=3)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        Stream([], split="dev")


def test_streams_are_samples():
    stream = Stream(make_batches())
    assert isinstance(stream, Samples)
    assert as_samples(stream, split="val") is stream
    assert as_samples(make_batches(), split="val").split == "val"
    with pytest.raises(DataError, match="several splits"):
        as_samples(Splits(stream))


def test_as_splits():
    stream = Stream(make_batches())
    splits = Splits(stream)
    assert as_splits(splits) is splits
    assert as_splits(stream).train is stream
    assert (as_splits(make_batches()).train.split, as_splits(make_batches()).val) == ("train", None)
    both = as_splits({"train": make_batches(), "val": loader(), "test": None})
    assert (both.val.split, len(both.val), both.test) == ("val", 10, None)
    for wrong in ({"val": loader()}, {"train": loader(), "dev": loader()}):
        with pytest.raises(DataError, match=r"there are splits called .*Give 'train'"):
            as_splits(wrong)
