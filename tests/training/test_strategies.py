import pytest

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.networks.attach import attach
from shallowdeep.networks.zoo import load_network
from shallowdeep.training.objectives import Distil, Exits, Joint, Plain
from shallowdeep.training.recipes import Recipe, named_recipe
from shallowdeep.training.strategies import STRATEGIES, Phase, named_strategy, with_epochs

PHASES = {
    "plain": [(Plain, "backbone")],
    "ic_only": [(Exits, "exits")],
    "joint": [(Joint, "all")],
    "mixed": [(Plain, "backbone"), (Joint, "all")],
    "distil": [(Distil, "exits")],
}


@pytest.fixture(scope="module")
def resnet(digits):
    """A network known by name, with two exits."""
    net = load_network("resnet20", num_classes=10)
    return attach(net, digits.example_inputs, taps=("layer1.0", "layer2.1"))


def test_every_strategy_has_a_line_in_the_table():
    assert set(PHASES) == set(STRATEGIES)


@pytest.mark.parametrize("name", PHASES)
@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_phases(name, recipe, resnet):
    phases = named_strategy(name, resnet, recipe)
    assert [(type(phase.objective), phase.trains) for phase in phases] == PHASES[name]
    assert [phase.recipe for phase in phases] == [
        named_recipe(recipe, trains, "resnet20") for _, trains in PHASES[name]
    ]


def test_paper_weight_decay_follows_the_network(resnet, build):
    assert named_strategy("joint", resnet, "paper")[0].recipe.weight_decay == 1e-4
    assert named_strategy("joint", build(), "paper")[0].recipe.weight_decay == 5e-4


@pytest.mark.parametrize("name", ["ic_only", "joint", "mixed", "distil"])
def test_internal_exits_are_needed(name, build):
    with pytest.raises(ConfigError, match=f"'{name}' trains internal exits, and this network has none"):
        named_strategy(name, build(taps=()))


def test_plain_needs_no_exits(build):
    (phase,) = named_strategy("plain", build(taps=()))
    assert phase.trains == "backbone"


def test_joint_weighs_by_the_shares_that_were_asked_for(build):
    sdn = build(taps=None, shares=(0.7, 0.3))
    assert named_strategy("joint", sdn)[0].objective == Joint((0.3, 0.7))
    assert named_strategy("mixed", sdn)[1].objective == Joint((0.3, 0.7))
    assert [placement.got for placement in sdn.placements] != [0.3, 0.7]


def test_joint_weighs_by_measured_shares_where_taps_were_given(build):
    sdn = build()
    weights = named_strategy("joint", sdn)[0].objective.weights
    # convolutions: 16x16 places x 8 x 27 and 8x8 places x 16 x 72 multiply-adds; the linear layer 2,560
    flops = [16 * 16 * 8 * 27, 8 * 8 * 16 * 72, 2560]
    assert weights == pytest.approx([flops[0] / sum(flops), (flops[0] + flops[1]) / sum(flops)], rel=1e-12)


def test_unknown_names(build):
    with pytest.raises(UnknownName, match=r"no strategy 'join'. Did you mean 'joint'"):
        named_strategy("join", build())
    with pytest.raises(UnknownName, match="no recipe 'slow'"):
        named_strategy("joint", build(), "slow")


def test_recipe_by_value_and_by_function(build):
    recipe = Recipe(epochs=3, lr=0.1, label_smoothing=0.1)
    for phase in named_strategy("mixed", build(), recipe):
        assert phase.recipe == recipe
        assert phase.objective.label_smoothing == 0.1
    asked = []

    def recipe_for(trains):
        asked.append(trains)
        return recipe

    named_strategy("mixed", build(), recipe_for)
    assert asked == ["backbone", "all"]


def test_epochs_change_each_phase_and_nothing_else(build):
    for phase, plain in zip(named_strategy("mixed", build(), epochs=7), named_strategy("mixed", build()), strict=True):
        assert phase.recipe == plain.recipe.model_copy(update={"epochs": 7})
    recipe = Recipe(epochs=3, lr=0.1)
    assert with_epochs(recipe, None) is recipe
    with pytest.raises(ValueError, match="epochs"):
        with_epochs(recipe, 0)


def test_phases_are_values(build):
    assert named_strategy("joint", build()) == named_strategy("joint", build())
    phase = Phase(Plain(), "backbone", Recipe(epochs=1, lr=0.1))
    # a checkpoint tells runs apart by this text
    assert repr(phase).startswith("Phase(objective=Plain(label_smoothing=0.0), trains='backbone', recipe=Recipe(")
