"""How the cells on a page were run: the commands that run them again, the machines, the times."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence

from shallowdeep.studies.paper.evidence import counted_as
from shallowdeep.studies.paper.layout import Group, label, markdown_table, paragraph, title_of_network
from shallowdeep.studies.paper.matrix import DATA, NETWORKS, PASSES, STRATEGIES, Matrix
from shallowdeep.studies.results import BACKDOORS, CellResult
from shallowdeep.studies.selection import patterns_of
from shallowdeep.studies.tasks import title_of


def show_how(groups: Sequence[Group], num_given: int = 0) -> list[str]:
    """The page's last section.

    Args:
        groups: all on the page.
        num_given: attacked runs that lie elsewhere than beside the cells' results.
    """
    given = f"""{counted_as(num_given, "attacked run")} {"was" if num_given == 1 else "were"} given by `--backdoor`. In
        `results/paper/{BACKDOORS}/` the last command reads what lies there by itself."""
    return [
        *paragraph(
            """Each cell has a file under `results/paper/` with its configuration, figures, fingerprints of the data,
            revision and the command that makes it again. These commands run the cells of this page, no others, and then
            write the page. A cell whose file is there counts as done; with another `--results` and `--runs` it is
            trained again:"""
        ),
        "",
        "```sh",
        *(command for group in groups for command in commands_of(group)),
        "shallowdeep study paper --table",
        "```",
        "",
        *([*paragraph(given), ""] if num_given else []),
        *_places([result for group in groups for result in group.results]),
        "",
        *paragraph(
            """Minutes of training, and in brackets epochs, of each cell in the mean over seeds: the median epoch times
            the epochs, so that pauses do not count; validation does not either, a machine shared with other work does.
            Mixed is without the plain phase that it goes on from, IC-only with the time to record what the exits see,
            where that was done. *Precision* is that of the arithmetic of training, which the recipe `fast` leaves to
            the machine."""
        ),
        "",
        *_times(groups),
    ]


def commands_of(group: Group) -> list[str]:
    """Command lines that run a group's cells again, and no others: one, or where options differ, one for each."""
    alike: dict[tuple[int, int | None], list[CellResult]] = {}
    for result in group.results:
        alike.setdefault(_options_of(result), []).append(result)
    # IC-only cells of unusual passes come after the plain ones that they start from.
    order = sorted(alike, key=lambda options: (options[0], options[1] is not None, options[1] or 0))
    return [_command(group, alike[options], *options) for options in order]


def _options_of(result: CellResult) -> tuple[int, int | None]:
    """A cell's threads, and the passes of IC-only training where they are not the recipe's own."""
    passes = result.config.features.passes
    usual = result.strategy != "ic_only" or passes == PASSES.get(result.config.recipe.name, 0)
    return result.config.threads or Matrix.threads, None if usual else passes


def _command(group: Group, results: Sequence[CellResult], threads: int, passes: int | None) -> str:
    networks = {result.config.network for result in results}
    matrix = Matrix(
        data=DATA if group.data in DATA else (group.data,),
        networks=NETWORKS if networks <= set(NETWORKS) else tuple(sorted(networks)),
        recipes=(group.recipe_name,),
        seeds=tuple(sorted({result.config.seed for result in results})),
        epochs=group.epochs,
        threads=threads,
        passes=passes,
    )
    patterns = patterns_of([result.name for result in results], [cell.name for cell in matrix.cells()])
    return shlex.join(["shallowdeep", *matrix.command(patterns)])


def _places(results: Sequence[CellResult]) -> list[str]:
    """Machines and versions, and the cells that were begun on one and gone on with on another."""
    found: dict[tuple[str, ...], list[CellResult]] = {}
    for result in results:
        precision = f", in {' and '.join(result.precisions)}" if result.precisions else ""
        found.setdefault((*result.provenance.places[:-1], result.provenance.places[-1] + precision), []).append(result)
    lines = []
    for places, cells in sorted(found.items()):
        hours = sum(cell.training_seconds for cell in cells) / 3600
        counted = f"{counted_as(len(cells), 'cell')}, {hours:.1f} hours of training"
        moved = "" if len(places) == 1 else f" ({', '.join(sorted(cell.name for cell in cells))})"
        lines += paragraph(f"- {', then '.join(places)}: {counted}{moved}")
    return lines


def _times(groups: Sequence[Group]) -> list[str]:
    rows = [
        [
            title_of(group.data),
            group.recipe,
            title_of_network(network),
            " and ".join(_precisions(group, network)) or "not kept",
            *(_time(group.of(network, strategy)) for strategy in STRATEGIES),
        ]
        for group in groups
        for network in group.networks(NETWORKS)
    ]
    return markdown_table(["data", "recipe", "network", "precision", *map(label, STRATEGIES)], rows)


def _precisions(group: Group, network: str) -> list[str]:
    runs = [result for result in group.results if result.config.network == network]
    return sorted({precision for run in runs for precision in run.precisions})


def _time(runs: Sequence[CellResult]) -> str:
    if not runs:
        return "–"
    epochs = "/".join(str(number) for number in sorted({run.epochs for run in runs}))
    return f"{statistics.fmean(run.training_seconds for run in runs) / 60:.1f} ({epochs})"
