"""Training on anybody's batches, with labels and without."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shallowdeep.data.samples import Splits
from shallowdeep.data.streams import Stream
from shallowdeep.errors import ConfigError, DataError
from shallowdeep.networks.attach import attach
from shallowdeep.networks.exits import TokenClassifier
from shallowdeep.networks.zoo import load_network
from shallowdeep.traces.record import record
from shallowdeep.training.loop import _epoch_seed, fit
from shallowdeep.training.recipes import Recipe

RECIPE = Recipe(epochs=1, batch_size=64, lr=0.05, schedule="constant")
OPTIONS = {"recipe": RECIPE, "device": "cpu", "progress": False}


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def little(digits):
    return digits.train.subset(range(273))


def batches_of(images, epoch):
    for batch in images.batches(64, seed=_epoch_seed(0, 0, epoch), drop_last=True):
        yield batch.inputs, batch.labels


def test_the_same_batches_streamed_end_at_the_same_weights(build, little):
    held, streamed = build(), build()
    fit(held, Splits(train=little), **OPTIONS)
    history = fit(streamed, Stream(lambda: batches_of(little, 0), num_batches=4), **OPTIONS)
    assert same(state(held), state(streamed))
    assert "val_accuracy" not in history[0]


def test_a_shuffled_loader_resumes_to_the_same_weights(build, little, tmp_path):
    inputs = torch.cat([batch.inputs for batch in little.batches(64)])
    loader = DataLoader(TensorDataset(inputs, little.labels), batch_size=64, shuffle=True, drop_last=True)

    class Stopped(Exception):
        pass

    class Epochs:
        def __init__(self, stop_in=None):
            self.stop_in, self.epoch = stop_in, 0

        def __len__(self):
            return len(loader)

        def __iter__(self):
            self.epoch += 1
            if self.epoch == self.stop_in:
                raise Stopped
            return iter(loader)

    whole, parts, again = build(), build(), build()
    fit(whole, Epochs(), **OPTIONS, epochs=3)
    with pytest.raises(Stopped):
        fit(parts, Epochs(stop_in=3), **OPTIONS, epochs=3, folder=tmp_path)
    fit(again, Epochs(), **OPTIONS, epochs=3, folder=tmp_path, resume=True)
    assert same(state(whole), state(again))
    assert not same(state(whole), state(parts))


def test_exits_learn_a_networks_own_answers_without_labels(build, digits):
    sdn = build()
    fit(sdn, digits, strategy="plain", recipe=RECIPE.model_copy(update={"epochs": 4}), device="cpu", progress=False)
    before, answers = state(sdn.backbone), record(sdn, digits.test).logits[-1]

    def unlabelled():
        return (batch.inputs for batch in digits.train.batches(64))

    untaught = fit(sdn, Splits(train=Stream(unlabelled, num_batches=20)), strategy="distil", **OPTIONS)
    history = fit(
        sdn,
        Splits(train=Stream(unlabelled, num_batches=20), val=Stream(unlabelled)),
        strategy="distil",
        recipe=RECIPE.model_copy(update={"epochs": 6, "lr": 0.02}),
        device="cpu",
        progress=False,
    )
    assert same(state(sdn.backbone), before)
    assert torch.equal(record(sdn, digits.test).logits[-1], answers)
    assert history[-1]["train_agreement"][-1] == 1.0  # the last exit agrees with itself
    assert history[-1]["val_agreement"][1] > max(untaught[0]["train_agreement"][1], 0.6)
    assert not any("accuracy" in key for key in history[-1])


@pytest.mark.parametrize("strategy", ["plain", "ic_only", "joint"])
def test_labels_are_asked_for_where_a_loss_needs_them(strategy, build, little):
    inputs = [batch.inputs for batch in little.batches(64)]
    with pytest.raises(DataError, match=r"needs labels, and the data has none\. Train with strategy='distil'"):
        fit(build(), inputs, strategy=strategy, **OPTIONS)


def test_an_objective_of_ones_own_may_do_without_labels(build, little):
    inputs = [batch.inputs for batch in little.batches(64)]

    def spread(logits, labels, progress):
        assert labels is None
        return sum(x.square().mean() for x in logits)

    from shallowdeep.training.strategies import Phase

    (record,) = fit(build(), inputs, strategy=(Phase(spread, "all", RECIPE),), device="cpu", progress=False)
    assert record["loss"] > 0


def test_an_iterator_that_is_used_up_is_found_out(build, little):
    stream = Stream(batches_of(little, 0), num_batches=4)
    with pytest.raises(DataError, match="iterated again"):
        fit(build(), stream, recipe=RECIPE, epochs=2, device="cpu", progress=False)


def test_a_stream_without_a_length_is_asked_for_one(build, little):
    with pytest.raises(ConfigError, match="num_batches"):
        fit(build(), lambda: batches_of(little, 0), **OPTIONS)


class MaskedMean(nn.Module):
    def forward(self, hidden, mask):
        return (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]


class Words(nn.Module):
    """The mean of word vectors, after two layers; padding is masked out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.pool, self.head = MaskedMean(), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.second(self.first(self.embed(input_ids)).tanh()).tanh()
        return {"logits": self.head(self.pool(hidden, attention_mask)), "hidden": hidden}


def test_inputs_by_name_are_trained_and_recorded(tmp_path):
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (64, 6), generator=random)
    labels = ids[:, 0] % 3
    batches = [
        {"input_ids": some, "attention_mask": torch.ones_like(some), "labels": some[:, 0] % 3} for some in ids.split(16)
    ]
    example = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sdn = attach(Words(), example, taps=("first",))
    assert isinstance(sdn.exits[0], TokenClassifier)
    assert sdn.exits[0].pool == "first"
    recipe = Recipe(epochs=60, batch_size=16, optimizer="adam", lr=0.02, schedule="constant", weight_decay=0.0)
    history = fit(sdn, batches, recipe=recipe, device="cpu", progress=False)
    assert history[-1]["train_accuracy"][0] > 0.9  # the label is in the first word
    trace = record(sdn, batches, split="val")
    assert torch.equal(trace.labels, labels)
    assert trace.info.split == "val"
    assert trace.correct[:, 0].float().mean() == pytest.approx(history[-1]["train_accuracy"][0], abs=0.1)


def test_a_frozen_network_answers_bit_for_bit_as_before_after_a_recipe_in_channels_last(digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sdn = attach(load_network("resnet20", num_classes=10), digits.example_inputs, taps=("layer1.1",)).eval()
    with torch.no_grad():
        before = sdn(digits.test.example_inputs)[-1]
    recipe = RECIPE.model_copy(update={"channels_last": True})
    fit(sdn, [digits.train.example_inputs] * 2, strategy="distil", recipe=recipe, device="cpu", progress=False)
    with torch.no_grad():
        assert torch.equal(sdn(digits.test.example_inputs)[-1], before)
    assert all(p.is_contiguous() for p in sdn.parameters())


def test_labels_that_are_there_change_nothing_in_distillation(build, little):
    with_labels, without = build(), build()
    fit(with_labels, list(batches_of(little, 0)), strategy="distil", **OPTIONS)
    fit(without, [inputs for inputs, _ in batches_of(little, 0)], strategy="distil", **OPTIONS)
    assert same(state(with_labels), state(without))


class Odd(nn.Module):
    """What fits no picture of a network: a mask of infinities, a five-dimensional weight, one-by-one convolutions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.volume = nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1))
        self.mix, self.pool, self.head = nn.Conv2d(8, 32, 1), nn.AvgPool2d(32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.pool(self.mix(self.volume(x[:, :, None])[:, :, 0]).relu()).flatten(1))


def test_the_default_recipe_trains_odd_networks_and_leaves_a_frozen_one_as_it_was(digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sdn = attach(Odd(), digits.example_inputs, taps=("mix",)).eval()
    strides = [p.stride() for p in sdn.parameters()]
    with torch.no_grad():
        before = sdn(digits.test.example_inputs)[-1]
    fit(sdn, [digits.train.example_inputs] * 2, strategy="distil", epochs=1, device="cpu", progress=False)
    with torch.no_grad():
        assert torch.equal(sdn(digits.test.example_inputs)[-1], before)
    assert [p.stride() for p in sdn.parameters()] == strides


def test_a_label_that_no_output_is_for_is_named(build, little):
    batches = [(inputs, labels + 5) for inputs, labels in batches_of(little, 0)]
    with pytest.raises(DataError, match="there are 10 classes, counted from 0"):
        fit(build(), batches, **OPTIONS)
