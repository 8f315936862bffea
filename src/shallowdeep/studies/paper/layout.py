"""Groups of results, and how their figures are written on a page."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shallowdeep.analysis.budgets import BUDGETS
from shallowdeep.studies.results import CellResult

COLUMNS = tuple((budget, "Max" if budget is None else f"≤ {100 * budget:.0f} %") for budget in BUDGETS)
"""The paper's budgets, and how a table's head names them."""
NETWORK_TITLES = {"vgg16": "VGG-16", "resnet56": "ResNet-56", "wrn32_4": "WideResNet-32-4", "mobilenet": "MobileNet"}


@dataclass(frozen=True)
class Group:
    """Results that share data, recipe and length.

    Attributes:
        data: name of the data set.
        recipe_name: of the recipe.
        epochs: of every training; ``None``: the recipe's own.
        results: in the order of their names.
    """

    data: str
    recipe_name: str
    epochs: int | None
    results: tuple[CellResult, ...]

    @property
    def recipe(self) -> str:
        """The recipe and, where it is not its own, the length."""
        if self.epochs is None:
            return self.recipe_name
        return f"{self.recipe_name}, {self.epochs} epoch{'' if self.epochs == 1 else 's'}"

    @property
    def is_cross_fitted(self) -> bool:
        """Whether thresholds come from halves of the test split."""
        return all(result.n_val == 0 for result in self.results)

    def of(self, network: str, strategy: str) -> list[CellResult]:
        """A cell under every seed it was run with."""
        return sorted(
            (r for r in self.results if r.config.network == network and r.strategy == strategy),
            key=lambda result: result.config.seed,
        )

    def networks(self, order: Sequence[str]) -> list[str]:
        """Those that were run: in an order, and after it the others."""
        found = {result.config.network for result in self.results}
        return [*(name for name in order if name in found), *sorted(found - {*order})]


def groups_of(results: Sequence[CellResult], order: Sequence[str]) -> list[Group]:
    """Results in groups: data sets in an order, others after them, recipes by name and length."""
    found: dict[tuple[str, str, int | None], list[CellResult]] = {}
    for result in sorted(results, key=lambda result: result.name):
        recipe = result.config.recipe
        found.setdefault((result.config.data, recipe.name, recipe.epochs), []).append(result)

    def place(key: tuple[str, str, int | None]) -> tuple[int, str, str, int]:
        data, name, epochs = key
        return order.index(data) if data in order else len(order), data, name, epochs or 0

    return [Group(*key, tuple(found[key])) for key in sorted(found, key=place)]


def flaws_of(group: Group) -> list[str]:
    """Why a group's figures are no match for published ones; empty where they are."""
    return list(dict.fromkeys(flaw for result in group.results for flaw in result.flaws))


def label(strategy: str) -> str:
    """A strategy as people write it."""
    return {"ic_only": "IC-only"}.get(strategy, strategy)


def title_of_network(name: str) -> str:
    """A network's name as people write it."""
    return NETWORK_TITLES.get(name, name)


def signed(number: float, digits: int = 2) -> str:
    """A number with its sign; one that rounds to zero has no minus.

    >>> signed(-0.291), signed(-0.001)
    ('−0.29', '+0.00')
    """
    return f"{number:+z.{digits}f}".replace("-", "−")


def percent(share: float, digits: int = 2) -> str:
    """A share in per cent, without the sign.

    >>> percent(0.70125, 1)
    '70.1'
    """
    return f"{100 * share:z.{digits}f}".replace("-", "−")


def mean_text(shares: Sequence[float]) -> str:
    """The mean in per cent, with the standard deviation where there are several; a dash where there are none.

    >>> mean_text([0.70, 0.72]), mean_text([0.7]), mean_text([])
    ('71.00 ± 1.41', '70.00', '–')
    """
    if not shares:
        return "–"
    mean = percent(statistics.fmean(shares))
    return mean if len(shares) == 1 else f"{mean} ± {percent(statistics.stdev(shares))}"


def counts_text(counts: Sequence[int]) -> str:
    """Numbers of runs of several strategies: one number where all that were run are alike, else each.

    >>> counts_text([1, 0, 1]), counts_text([2, 1, 2])
    ('1', '2/1/2')
    """
    present = {count for count in counts if count}
    return str(*present) if len(present) == 1 else "/".join(map(str, counts))


def mean_of_met(shares: Sequence[float | None]) -> str:
    """The mean over runs that met a budget; where some did not, that alone is said.

    >>> mean_of_met([0.7, 0.72]), mean_of_met([None]), mean_of_met([0.7, None, 0.72])
    ('71.00 ± 1.41', 'none', 'none in 1 of 3')
    """
    met = [share for share in shares if share is not None]
    if len(met) == len(shares):
        return mean_text(met)
    return f"none in {len(shares) - len(met)} of {len(shares)}" if met else "none"


def mean_over(runs: Sequence[CellResult], value: Callable[[CellResult], float]) -> str:
    """The mean of one share of some runs, as ``mean_text`` writes it."""
    return mean_text([value(run) for run in runs])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, a line per row."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def paragraph(text: str) -> list[str]:
    """Prose in lines of at most 120 characters, however it was laid out in the source."""
    return textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
