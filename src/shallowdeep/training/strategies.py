"""Strategies: how an SDN is trained, as a tuple of phases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import spec_of
from shallowdeep.training.objectives import Distil, Exits, Joint, Objective, Plain
from shallowdeep.training.recipes import Recipe, Trains, named_recipe

RecipeFor = Callable[[Trains], Recipe]


@dataclass(frozen=True)
class Phase:
    """One stretch of training: what is minimised, which weights move, and how.

    With ``trains="backbone"`` the internal exits are not run; with ``"exits"`` the backbone is frozen, in
    evaluation mode.
    """

    objective: Objective
    trains: Trains
    recipe: Recipe


Strategy = tuple[Phase, ...]


def _plain(sdn: ShallowDeepNetwork, recipe: RecipeFor) -> Strategy:
    chosen = recipe("backbone")
    return (Phase(Plain(chosen.label_smoothing), "backbone", chosen),)


def _ic_only(sdn: ShallowDeepNetwork, recipe: RecipeFor) -> Strategy:
    chosen = recipe("exits")
    return (Phase(Exits(chosen.label_smoothing), "exits", chosen),)


def _joint(sdn: ShallowDeepNetwork, recipe: RecipeFor) -> Strategy:
    chosen = recipe("all")
    weights = sdn.costs.nominal or tuple(placement.got for placement in sdn.placements)
    return (Phase(Joint(weights[: len(sdn.exits)], chosen.label_smoothing), "all", chosen),)


def _mixed(sdn: ShallowDeepNetwork, recipe: RecipeFor) -> Strategy:
    return _plain(sdn, recipe) + _joint(sdn, recipe)


def _distil(sdn: ShallowDeepNetwork, recipe: RecipeFor) -> Strategy:
    return (Phase(Distil(), "exits", recipe("exits")),)


STRATEGIES: dict[str, Callable[[ShallowDeepNetwork, RecipeFor], Strategy]] = {
    "plain": _plain,
    "ic_only": _ic_only,
    "joint": _joint,
    "mixed": _mixed,
    "distil": _distil,
}
INTERNAL = {"ic_only", "joint", "mixed", "distil"}
"""Strategies that train internal exits, and therefore need some."""


def named_strategy(
    name: str,
    sdn: ShallowDeepNetwork,
    recipe: str | Recipe | RecipeFor = "fast",
    *,
    epochs: int | None = None,
) -> Strategy:
    """The phases of a strategy by name.

    Args:
        name: ``"plain"``: the backbone alone. ``"ic_only"``: the exits of a frozen, trained backbone.
            ``"joint"``: all together, with the paper's rising weights. ``"mixed"``: plain, then joint.
            ``"distil"``: the exits of a frozen, trained backbone learn its own answers, without labels.
        sdn: what will be trained; joint takes its weights from the shares its exits were asked to sit at
            (from their measured shares where taps were given by name).
        recipe: a name, one recipe for every phase, or a function from what a phase trains to a recipe.
        epochs: length of *each* phase, instead of the recipe's own.

    Raises:
        UnknownName: no such strategy or recipe.
        ConfigError: it trains internal exits, and the network has none.

    Cite: plain, ic_only, joint: Kaya, Hong & Dumitras, ICML 2019. mixed: Kubaty et al., ICML 2025.
    """
    if name not in STRATEGIES:
        raise UnknownName("strategy", name, STRATEGIES)
    if name in INTERNAL and not sdn.exits:
        raise ConfigError(f"strategy '{name}' trains internal exits, and this network has none. Attach some.")

    def recipe_for(trains: Trains) -> Recipe:
        spec = spec_of(sdn.backbone)
        if isinstance(recipe, str):
            chosen = named_recipe(recipe, trains, "" if spec is None else spec.name)
        else:
            chosen = recipe if isinstance(recipe, Recipe) else recipe(trains)
        return with_epochs(chosen, epochs)

    return STRATEGIES[name](sdn, recipe_for)


def with_epochs(recipe: Recipe, epochs: int | None) -> Recipe:
    """The same recipe over another length; ``None``: over its own.

    Raises:
        ConfigError: it is none.
    """
    if epochs is not None and epochs < 1:
        raise ConfigError(f"a phase lasts 1 epoch or more, got epochs={epochs}.")
    return recipe if epochs is None else Recipe(**{**recipe.model_dump(), "epochs": epochs})
