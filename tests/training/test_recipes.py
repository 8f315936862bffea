import math
from itertools import groupby, pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn, optim

from shallowdeep.errors import UnknownName
from shallowdeep.networks.zoo import networks
from shallowdeep.training.recipes import Recipe, named_recipe

DECAYS = {
    "vgg16": 5e-4,
    "wrn32_4": 5e-4,
    "resnet20": 1e-4,
    "resnet56": 1e-4,
    "resnet110": 1e-4,
    "mobilenet": 1e-4,
}


def epochs_per_rate(recipe):
    """Rate and number of epochs of each stretch, looking at the first and the last of 391 batches."""
    rates = []
    for epoch in range(recipe.epochs):
        first, last = (recipe.rate((epoch + step / 391) / recipe.epochs) for step in (0, 390))
        assert first == last
        rates.append(first)
    return [(rate, len(list(same))) for rate, same in groupby(rates)]


def test_every_network_has_a_line_in_the_table_of_decays():
    assert set(DECAYS) == set(networks())


@pytest.mark.parametrize(("network", "decay"), [*DECAYS.items(), ("", 5e-4), ("mine", 5e-4)])
@pytest.mark.parametrize("trains", ["backbone", "all", "exits"])
def test_paper_weight_decay(network, decay, trains):
    assert named_recipe("paper", trains, network).weight_decay == decay


@pytest.mark.parametrize("trains", ["backbone", "all"])
def test_paper_trains_a_network_with_plain_sgd(trains):
    recipe = named_recipe("paper", trains, "resnet56")
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.lr) == (100, 128, "sgd", 0.1)
    assert (recipe.momentum, recipe.nesterov, recipe.clip_norm, recipe.label_smoothing) == (0.9, False, None, 0)
    assert (recipe.precision, recipe.channels_last) == ("fp32", False)
    # 0.1 to the power of 1, 2, 3 is rounded
    expected = [(pytest.approx(rate, rel=1e-12), n) for rate, n in [(0.1, 34), (0.01, 25), (1e-3, 25), (1e-4, 16)]]
    assert epochs_per_rate(recipe) == expected


def test_paper_trains_exits_with_adam():
    recipe = named_recipe("paper", "exits", "resnet56")
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.lr) == (25, 128, "adam", 1e-3)
    assert epochs_per_rate(recipe) == [(1e-3, 14), (pytest.approx(1e-4, rel=1e-12), 11)]


@pytest.mark.parametrize("trains", ["backbone", "all"])
@pytest.mark.parametrize("epochs", [50, 200])
def test_milestones_scale_with_the_length(trains, epochs):
    recipe = named_recipe("paper", trains, "vgg16").model_copy(update={"epochs": epochs})
    rates = [recipe.rate(epoch / epochs) for epoch in range(epochs)]
    lengths = [len(list(same)) for _, same in groupby(rates)]
    # half an epoch more or less where a milestone falls into the middle of one
    assert lengths == pytest.approx([epochs * share / 100 for share in (34, 25, 25, 16)], abs=0.5)


@pytest.mark.parametrize("trains", ["backbone", "all", "exits"])
def test_one_cycle_rises_straight_and_falls_as_a_cosine(trains):
    recipe = named_recipe("fast", trains)
    peak, warmup = recipe.lr, recipe.warmup
    assert (recipe.schedule, warmup) == ("one_cycle", 0.25)
    assert recipe.rate(0.0) == pytest.approx(0.04 * peak)
    assert recipe.rate(warmup / 2) == pytest.approx(0.52 * peak)
    assert recipe.rate(warmup) == pytest.approx(peak)
    assert recipe.rate((1 + warmup) / 2) == pytest.approx(peak / 2)
    assert recipe.rate(1 - 1e-6) == pytest.approx(0, abs=1e-9)
    rates = [recipe.rate(i / 1000) for i in range(1000)]
    top = rates.index(max(rates))
    assert top == 250
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    # no jump: the steepest step of either part, and a little
    steepest = max(0.96 / warmup, 0.5 * math.pi / (1 - warmup)) * peak / 1000
    assert max(abs(a - b) for a, b in pairwise(rates)) <= 1.001 * steepest


def test_a_constant_schedule_is_constant():
    recipe = Recipe(epochs=3, lr=0.5, schedule="constant", milestones=(0.5,))
    assert {recipe.rate(i / 10) for i in range(10)} == {0.5}


def test_fast_recipes_clip_and_choose_their_precision():
    for trains, optimizer, decay in [("backbone", "sgd", 5e-4), ("all", "sgd", 5e-4), ("exits", "adamw", 1e-2)]:
        recipe = named_recipe("fast", trains, "vgg16")
        assert (recipe.optimizer, recipe.weight_decay) == (optimizer, decay)
        assert (recipe.clip_norm, recipe.precision, recipe.channels_last) == (5.0, "auto", True)
        assert recipe.label_smoothing == 0  # it would change every confidence


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownName, match=r"no recipe 'papper'. Did you mean 'paper'"):
        named_recipe("papper", "all")


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"optimizer": "lion"},
        {"schedule": "steps"},
        {"warmup": 0.0},
        {"warmup": 1.0},
        {"clip_norm": 0.0},
        {"label_smoothing": 1.0},
        {"precision": "fp16"},
        {"learning_rate": 0.1},
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        Recipe(**({"epochs": 1, "lr": 0.1} | bad))


def test_a_recipe_does_not_change():
    recipe = Recipe(epochs=1, lr=0.1)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lr = 0.2
    assert recipe.lr == 0.1


@pytest.mark.parametrize(("name", "kind"), [("sgd", optim.SGD), ("adam", optim.Adam), ("adamw", optim.AdamW)])
def test_optimizers_take_the_settings(name, kind):
    recipe = Recipe(epochs=2, lr=0.3, optimizer=name, weight_decay=0.01, momentum=0.8, nesterov=name == "sgd")
    parameter = nn.Parameter(torch.ones(2))
    optimizer = recipe.build_optimizer([parameter])
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.01)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.8, True, 0)
    else:
        assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.999), 1e-8)
    assert group["params"] == [parameter]
