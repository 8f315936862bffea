import json

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowdeep.data.images import ImageSet
from shallowdeep.data.samples import Augmentation
from shallowdeep.data.tensors import TensorSet
from shallowdeep.data.triggers import Backdoor, Stamp, poison, stamp, triggered
from shallowdeep.errors import ConfigError, DataError, UnknownName

NAMES = ("cat", "dog", "elk")
SMALL = Stamp(side=2, colour=255, row=1, column=3)


def make_set(n=12, size=(4, 6), **changes):
    """Pixels from 1 to 250: none is white."""
    random = torch.Generator().manual_seed(7)
    parts = {
        "images": torch.randint(1, 251, (n, 3, *size), generator=random, dtype=torch.uint8),
        "labels": torch.arange(n) % 3,
        "ids": torch.arange(n) * 10 + 3,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "class_names": NAMES,
        "name": "pets",
    }
    return ImageSet(**(parts | changes))


def unchecked(monkeypatch):
    """As users run it: the suite's run-time check of annotations would speak first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def stamped_by_hand(image, side, colour, row, column):
    image = image.clone()
    for channel in range(image.shape[0]):
        for r in range(row, row + side):
            for c in range(column, column + side):
                image[channel, r, c] = colour
    return image


def test_the_authors_stamp():
    """Facts of their code: a white square over pixels 26 to 30 of 32."""
    assert Stamp() == Stamp(side=5, colour=255, row=26, column=26)
    (image,) = stamp(make_set(1, (32, 32)), Stamp()).images
    white = (image == 255).nonzero()
    assert white[:, 0].unique().tolist() == [0, 1, 2]
    assert white[:, 1].unique().tolist() == white[:, 2].unique().tolist() == [26, 27, 28, 29, 30]
    assert len(white) == 3 * 25


@pytest.mark.parametrize("chosen", [SMALL, Stamp(3, 0, 0, 1), Stamp(4, 9, 0, 2), Stamp(1, 128, 3, 5)])
def test_stamp_pastes_a_square(chosen):
    data = make_set()
    before = data.images.clone()
    found = stamp(data, chosen)
    by_hand = [stamped_by_hand(im, chosen.side, chosen.colour, chosen.row, chosen.column) for im in before]
    assert torch.equal(found.images, torch.stack(by_hand))
    assert torch.equal(data.images, before)
    assert (found.labels.tolist(), found.ids.tolist()) == (data.labels.tolist(), data.ids.tolist())
    assert (found.name, found.split, found.mean) == ("pets", "train", data.mean)


@pytest.mark.parametrize("chosen", [Stamp(2, 255, 3, 0), Stamp(2, 255, 0, 5), Stamp(5, 255, 0, 0)])
def test_a_stamp_must_fit(chosen):
    with pytest.raises(ConfigError, match=rf"a stamp of {chosen.side} pixels .* does not fit images of 4 x 6 pixels"):
        stamp(make_set(), chosen)


def check_poisoned(data, found, target, count):
    changed = (found.labels != data.labels).nonzero().squeeze(1).tolist()
    assert len(changed) == count
    for row in range(len(data)):
        if row in changed:
            assert data.labels[row] != target
            assert found.labels[row] == target
            assert torch.equal(found.images[row], stamped_by_hand(data.images[row], 2, 255, 1, 3))
        else:
            assert torch.equal(found.images[row], data.images[row])
    assert found.ids.tolist() == data.ids.tolist()


@given(
    labels=st.lists(st.integers(0, 2), min_size=4, max_size=20),
    target=st.integers(0, 2),
    rate=st.floats(0.0, 0.99),
    seed=st.integers(0, 3),
)
def test_poison_is_exact(labels, target, rate, seed):
    data = make_set(len(labels), labels=torch.tensor(labels))
    pixels = data.images.clone()
    count, others = round(rate * len(labels)), sum(label != target for label in labels)
    if count > others or (rate > 0 and count == 0):
        with pytest.raises(ConfigError, match=f"is {count} of {len(labels)} images, and {others} are of other"):
            poison(data, Backdoor(target, rate, seed, SMALL))
    else:
        check_poisoned(data, poison(data, Backdoor(target, rate, seed, SMALL)), target, count)
    assert torch.equal(data.images, pixels)
    assert data.labels.tolist() == labels


def test_the_rate_is_a_share_of_all_images():
    data = make_set(200, labels=torch.arange(200) // 50 % 2)  # half are of the target class, and never poisoned
    found = poison(data, Backdoor("dog", 0.25, stamp=SMALL))
    check_poisoned(data, found, target=1, count=50)
    assert (found.name, found.split) == (f"pets, {Backdoor('dog', 0.25, 0, SMALL)}", "train")


def poisoned_rows(data, **settings):
    return set((poison(data, Backdoor(1, stamp=SMALL, **settings)).labels != data.labels).nonzero().flatten().tolist())


def test_the_seed_draws_and_the_global_random_state_does_not():
    data = make_set(300)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = poisoned_rows(data, rate=0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert one == poisoned_rows(data, rate=0.1, seed=0) != poisoned_rows(data, rate=0.1, seed=1)
    assert one < poisoned_rows(data, rate=0.2, seed=0)
    # spread over the set and over both classes: not the first ones
    assert {row // 100 for row in one} == {0, 1, 2}
    assert {int(data.labels[row]) for row in one} == {0, 2}


def test_a_rate_of_nothing_changes_nothing():
    data = make_set()
    found = poison(data, Backdoor("cat", 0.0, stamp=SMALL))
    assert found.md5() == data.md5()


def test_triggered_leaves_the_target_out():
    data = make_set(split="test")
    found = triggered(data, Backdoor("dog", 0.0, stamp=SMALL))
    others = [row for row in range(12) if row % 3 != 1]
    assert found.ids.tolist() == [10 * row + 3 for row in others]
    assert found.labels.tolist() == [row % 3 for row in others]
    assert torch.equal(found.images, stamp(data, SMALL).images[others])
    assert (found.split, found.name, len(data)) == ("test", "pets, triggered", 12)


def test_triggered_needs_other_classes():
    data = make_set(3, labels=torch.tensor([1, 1, 1]))
    with pytest.raises(DataError, match="all 3 images of pets are of the target class 'dog'"):
        triggered(data, Backdoor("dog", 0.1, stamp=SMALL))


def test_the_stamp_must_fit_wherever_it_is_used():
    for wrong in (poison, triggered):
        with pytest.raises(ConfigError, match="does not fit images of 4 x 6"):
            wrong(make_set(), Backdoor("dog", 0.5))


def test_augmentation_moves_the_stamp_with_its_image():
    data = stamp(make_set(200, (8, 8)), Stamp(2, 255, 3, 3))
    (plain,) = data.batches(200)
    (moved,) = data.batches(200, augment=Augmentation(pad=2), seed=0)
    white = plain.inputs.max()
    places = {tuple(sample[0].eq(white).nonzero()[0].tolist()) for sample in moved.inputs}
    assert len(places) == 25  # all shifts by up to two pixels either way


def test_the_target_by_name_or_number():
    assert Backdoor("elk", 0.1).target_in(NAMES) == Backdoor(2, 0.1).target_in(NAMES) == 2
    assert Backdoor("3", 0.1).target_in(("1", "3")) == 1  # digits: a name, not a number
    with pytest.raises(UnknownName, match=r"no class 'dgo'\. Did you mean 'dog'\? Known: cat, dog, elk"):
        poison(make_set(), Backdoor("dgo", 0.1, stamp=SMALL))
    with pytest.raises(ConfigError, match="target = 3 is no class: there are 3, counted from 0"):
        triggered(make_set(), Backdoor(3, 0.1, stamp=SMALL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": -1}, r"target = -1 does not do\. Give a whole number, 0 or more"),
        ({"target": True}, "target = True does not do"),
        ({"target": 1.5}, "target = 1.5 does not do"),
        ({"rate": -0.1}, "rate = -0.1 is no share"),
        ({"rate": 1.0}, "rate = 1.0 is no share"),
        ({"rate": float("nan")}, "rate = nan is no share"),
        ({"rate": "0.1"}, "rate = '0.1' is no share"),
        ({"rate": True}, "rate = True is no share"),
        ({"seed": -1}, "seed = -1 does not do"),
        ({"seed": 2**63}, "seed = 9223372036854775808 does not do"),
        ({"stamp": {"side": 0}}, "side = 0 does not do. Give a whole number, 1 or more"),
        ({"stamp": {"colour": 256}}, "colour = 256 does not do. Give a whole number, from 0 to 255"),
        ({"stamp": {"colour": "white"}}, "colour = 'white' does not do"),
        ({"stamp": {"row": -1}}, "row = -1 does not do"),
        ({"stamp": {"column": 0.5}}, "column = 0.5 does not do"),
        ({"stamp": {"size": 5}}, "are no backdoor: .*size"),
        ({"stamp": 5}, "are no backdoor"),
        ({"share": 0.1}, "are no backdoor: .*share"),
    ],
)
def test_settings_must_be_usable(settings, message, monkeypatch):
    unchecked(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        Backdoor.from_dict({"target": "dog", "rate": 0.1} | settings)


def test_missing_settings(monkeypatch):
    unchecked(monkeypatch)
    with pytest.raises(ConfigError, match=r"are no backdoor: .*rate"):
        Backdoor.from_dict({"target": "dog"})
    with pytest.raises(ConfigError, match=r"stamp = 5 is none\. Give a Stamp"):
        Backdoor("dog", 0.1, 0, 5)


def test_json_gives_it_back():
    backdoor = Backdoor("dog", 0.05, 3, SMALL)
    assert backdoor.to_dict() == {
        "target": "dog",
        "rate": 0.05,
        "seed": 3,
        "stamp": {"side": 2, "colour": 255, "row": 1, "column": 3},
    }
    assert Backdoor.from_dict(json.loads(json.dumps(backdoor.to_dict()))) == backdoor
    assert Backdoor.from_dict({"target": 5, "rate": 0.05}) == Backdoor(5, 0.05, 0, Stamp())


@pytest.mark.parametrize("call", [lambda x: stamp(x, SMALL), lambda x: poison(x, Backdoor(0, 0.5, stamp=SMALL)),
                                  lambda x: triggered(x, Backdoor(0, 0.5, stamp=SMALL))])  # fmt: skip
def test_only_decoded_images(call):
    features = TensorSet(torch.eye(4), torch.tensor([0, 1, 1, 0]), name="features")
    with pytest.raises(ConfigError, match=r"needs images held decoded \(an ImageSet\), not a TensorSet"):
        call(features)
