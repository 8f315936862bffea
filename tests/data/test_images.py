import hashlib

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowdeep.data.images import ImageSet
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.samples import Augmentation, Splits
from shallowdeep.data.stratify import stratified_split
from shallowdeep.errors import ConfigError, DataError


def make_set(n=10, channels=2, size=(4, 5), **changes):
    """A set whose pixels all differ from zero, the padding's colour."""
    random = torch.Generator().manual_seed(7)
    parts = {
        "images": torch.randint(1, 256, (n, channels, *size), generator=random, dtype=torch.uint8),
        "labels": torch.arange(n) % 2,
        "ids": torch.arange(n) * 10 + 3,
        "mean": (0.0,) * channels,
        "std": (1 / 255,) * channels,  # batches then hold the bytes themselves
        "class_names": ("a", "b"),
    }
    return ImageSet(**(parts | changes))


def gather(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def test_batches_are_normalised():
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    data = ImageSet(images, torch.tensor([0]), torch.tensor([0]), (0.5, 0.2), (0.25, 0.1), ("a",))
    (batch,) = data.batches(8)
    expected = torch.tensor([[[[-2.0, 2.0]], [[0.0, 2.0]]]])
    # one product and one difference round otherwise than the formula: a few units of the 24th bit
    torch.testing.assert_close(batch.inputs, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(data.example_inputs, expected, atol=1e-6, rtol=0)


def test_without_a_seed_batches_keep_the_order():
    data = make_set(10)
    batches = list(data.batches(4))
    assert [len(batch.ids) for batch in batches] == [4, 4, 2]
    inputs, labels, ids = gather(batches)
    assert ids.tolist() == [3, 13, 23, 33, 43, 53, 63, 73, 83, 93]
    assert labels.tolist() == [0, 1] * 5
    assert (labels.dtype, ids.dtype) == (torch.int64, torch.int64)
    assert torch.equal(inputs.round().to(torch.uint8), data.images)


@pytest.mark.parametrize(("drop_last", "count"), [(False, 3), (True, 2)])
def test_drop_last(drop_last, count):
    data = make_set(10)
    assert data.num_batches(4, drop_last) == count
    assert len(list(data.batches(4, seed=1, drop_last=drop_last))) == count


def test_a_seeded_pass_has_every_sample_once_in_another_order():
    data = make_set(50)
    inputs, labels, ids = gather(data.batches(7, seed=1))
    assert ids.tolist() != data.ids.tolist()
    assert sorted(ids.tolist()) == data.ids.tolist()
    rows = (ids - 3) // 10
    assert torch.equal(labels, data.labels[rows])
    assert torch.equal(inputs.round().to(torch.uint8), data.images[rows])


def test_the_seed_decides_and_the_global_random_state_does_not():
    data, augment = make_set(30), Augmentation(pad=2, flip=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = gather(data.batches(8, augment=augment, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = gather(data.batches(8, augment=augment, seed=5))
    other = gather(data.batches(8, augment=augment, seed=6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], other[2])


def test_crops_depend_neither_on_the_batch_size_nor_the_order_on_the_augmentation():
    data, augment = make_set(30), Augmentation(pad=2, flip=True)
    by_8 = gather(data.batches(8, augment=augment, seed=5))
    by_30 = gather(data.batches(30, augment=augment, seed=5))
    assert torch.equal(by_8[0], by_30[0])
    assert torch.equal(by_8[2], gather(data.batches(8, seed=5))[2])


def windows(image, pad, flips):
    """Every crop of one padded image, by loops."""
    channels, height, width = image.shape
    found = {}
    for flip in flips:
        padded = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=torch.uint8)
        padded[:, pad : pad + height, pad : pad + width] = image.flip(2) if flip else image
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                window = padded[:, top : top + height, left : left + width]
                found[tuple(window.flatten().tolist())] = (top, left, flip)
    return found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_augmented_images_are_crops_of_the_padded_image(pad, flip):
    data = make_set(400)
    inputs, _, ids = gather(data.batches(64, augment=Augmentation(pad, flip), seed=3))
    places = set()
    for pixels, row in zip(inputs.round().to(torch.uint8), (ids - 3) // 10, strict=True):
        known = windows(data.images[row], pad, {False, flip})
        places.add(known[tuple(pixels.flatten().tolist())])  # a KeyError: no such crop
    assert len(places) == (2 * pad + 1) ** 2 * (1 + flip)  # 400 draws meet all of at most 50 places


def test_no_augmentation_is_the_identity():
    data = make_set(10)
    plain, _, ids = gather(data.batches(4, augment=Augmentation(), seed=3))
    assert torch.equal(plain.round().to(torch.uint8), data.images[(ids - 3) // 10])


def test_images_are_not_changed():
    data = make_set(10)
    before = data.images.clone()
    list(data.batches(4, augment=Augmentation(2, True), seed=3))
    list(data.batches(4))
    assert torch.equal(data.images, before)


def test_channels_last_changes_the_layout_alone():
    data = make_set(10)
    augment = Augmentation(pad=1)
    plain = next(data.batches(4, augment=augment, seed=1)).inputs
    turned = next(data.batches(4, augment=augment, seed=1, channels_last=True)).inputs
    assert turned.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(plain, turned)


def test_wrong_calls_fail_before_the_first_batch():
    data = make_set()
    with pytest.raises(ConfigError, match="without a seed"):
        data.batches(4, augment=Augmentation(flip=True))
    with pytest.raises(ConfigError, match="batch of 0"):
        data.batches(0)
    with pytest.raises(ConfigError, match="pad by -1"):
        Augmentation(pad=-1)


def test_subset_keeps_ids():
    part = make_set(10).subset([4, 1], split="val")
    assert (part.ids.tolist(), part.labels.tolist(), part.split, len(part)) == ([43, 13], [0, 1], "val", 2)
    assert torch.equal(part.images, make_set(10).images[[4, 1]])


@pytest.mark.parametrize(("rows", "message"), [([10], "no sample 10"), ([-1], "no sample -1"), ([2, 2], "id 23")])
def test_subset_refuses(rows, message):
    with pytest.raises(DataError, match=message):
        make_set(10).subset(rows)


def test_sample_keeps_proportions_and_order():
    data = make_set(10, labels=torch.tensor([0] * 8 + [1] * 2))
    part = data.sample(5, seed=4)
    assert part.labels.tolist() == [0, 0, 0, 0, 1]
    assert part.ids.tolist() == sorted(part.ids.tolist())
    assert data.sample(11) is data


def test_example_inputs_of_a_small_set():
    assert make_set(10).example_inputs.shape == (4, 2, 4, 5)
    assert make_set(2).example_inputs.shape == (2, 2, 4, 5)


def test_to_moves_all_tensors():
    moved = make_set(3).to("cpu")
    assert (moved.device, moved.labels.device, moved.ids.device) == (torch.device("cpu"),) * 3


def test_md5_reads_row_by_row_with_channels_last():
    images = torch.tensor([[[[1, 2]], [[3, 4]]]], dtype=torch.uint8)
    data = ImageSet(images, torch.tensor([1]), torch.tensor([0]), (0.0,) * 2, (1.0,) * 2, ("a", "b"))
    assert data.md5() == {
        "images": hashlib.md5(bytes([1, 3, 2, 4])).hexdigest(),
        "labels": hashlib.md5(bytes([1])).hexdigest(),
    }


TREE = LabelTree((0, 0), ("x", "y"), ("z",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(10, 2, 4, 5)}, "images are torch.float32"),
        ({"images": torch.zeros(10, 4, 5, dtype=torch.uint8)}, r"shape \(10, 4, 5\)"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "10 images, 9 labels and 10 ids"),
        ({"ids": torch.arange(11)}, "10 images, 10 labels and 11 ids"),
        ({"labels": torch.zeros(10)}, "labels are torch.float32"),
        ({"labels": torch.full((10,), 2)}, "label 2 has no class name: there are 2"),
        ({"labels": torch.full((10,), -1)}, "label -1 has no class name"),
        ({"ids": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 4])}, "id 4 is there twice"),
        ({"mean": (0.5,)}, "do not fit 2 channels"),
        ({"std": (0.5, 0.0)}, "do not fit 2 channels"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"tree": TREE}, "neither the label tree's 2 fine nor its 1 coarse"),
    ],
)
def test_parts_must_fit(changes, message, monkeypatch):
    # as users run it: the suite's run-time check of annotations would speak first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(DataError, match=message):
        make_set(10, **changes)


def test_no_images_is_no_set():
    with pytest.raises(DataError, match="0 images"):
        make_set(0)


def test_splits_speak_for_their_training_part():
    data = make_set(6, name="toy")
    splits = Splits(data.subset([0, 1]), data.subset([2, 3], "val"), data.subset([4, 5], "test"), Augmentation(1))
    assert (splits.name, splits.num_classes, splits.class_names) == ("toy", 2, ("a", "b"))
    assert torch.equal(splits.example_inputs, data.example_inputs[:2])
    assert splits.to("cpu").augment == Augmentation(1)


def test_stratified_split_by_hand():
    # 3 of 10 from classes of 5, 3, 2: shares 1.5, 0.9, 0.6 -> 1, 0, 0 and the two largest remainders
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0])
    kept, held = stratified_split(labels, 3, seed=0)
    assert sorted(labels[held].tolist()) == [0, 1, 2]
    assert sorted(kept.tolist() + held.tolist()) == list(range(10))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 5))
def test_stratified_split_laws(classes, size, seed):
    labels, size = torch.tensor(classes) * 3, min(size, len(classes))
    kept, held = (part.tolist() for part in stratified_split(labels, size, seed))
    assert len(held) == size
    assert sorted(kept + held) == list(range(len(classes)))
    assert kept == sorted(kept)
    assert held == sorted(held)
    for label in set(classes):
        share = classes.count(label) * size / len(classes)
        assert abs(sum(classes[i] == label for i in held) - share) < 1
    assert stratified_split(labels, size, seed)[1].tolist() == held


def test_stratified_split_depends_on_the_seed_alone():
    labels = torch.arange(1000) % 10
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = stratified_split(labels, 100, seed=0)[1], stratified_split(labels, 100, seed=1)[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, two)
    assert labels[one].bincount().tolist() == [10] * 10


@pytest.mark.parametrize("size", [-1, 4])
def test_stratified_split_refuses(size):
    with pytest.raises(DataError, match=f"hold out {size} of 3"):
        stratified_split(torch.tensor([0, 0, 1]), size, seed=0)
