"""How the cells on a page were run: the commands that run them again, the machines, the times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from shallowdeep.studies.layout import Group, label, markdown_table, paragraph, title_of_network
from shallowdeep.studies.paper import DATA, NETWORKS, PASSES, STRATEGIES
from shallowdeep.studies.results import CellResult
from shallowdeep.studies.tasks import title_of


def show_how(groups: Sequence[Group]) -> list[str]:
    """The page's last section."""
    return [
        *paragraph(
            """Each cell has a file under `results/paper/` with its configuration, figures, fingerprints of the data,
            revision and the command that makes it again. All cells of a group, and then this page:"""
        ),
        "",
        "```sh",
        *(command for group in groups for command in commands_of(group)),
        "shallowdeep study paper --table",
        "```",
        "",
        *_places([result for group in groups for result in group.results]),
        "",
        *paragraph(
            """Minutes of training, and in brackets epochs, of each cell in the mean over seeds; validation is not
            counted, and a machine shared with other work shows. Mixed is without the plain phase that it goes on from,
            IC-only with the time to record what the exits see, where that was done."""
        ),
        "",
        *_times(groups),
    ]


def commands_of(group: Group) -> list[str]:
    """Command lines that run a group's cells again: one, or where options differ, one for each."""
    alike: dict[tuple[str, ...], list[CellResult]] = {}
    for result in group.results:
        alike.setdefault(_options_of(result), []).append(result)
    if len(alike) == 1:
        return [_command(group, [f"{group.data}/*"], *alike)]
    return [_command(group, [result.name for result in alike[options]], options) for options in sorted(alike)]


def _options_of(result: CellResult) -> tuple[str, ...]:
    """What is not as it would be without options, beside what cells of a group have in common."""
    threads, passes, usual = (
        result.config.threads or 1,
        result.config.features.passes,
        PASSES.get(result.config.recipe.name, 0),
    )
    return (
        *(() if threads == 1 else (f"--threads {threads}",)),
        *(() if result.strategy != "ic_only" or passes == usual else (f"--passes {passes}",)),
    )


def _command(group: Group, names: Sequence[str], options: Sequence[str]) -> str:
    seeds = ",".join(str(seed) for seed in sorted({result.config.seed for result in group.results}))
    networks = sorted({result.config.network for result in group.results})
    words = ["shallowdeep study paper", *(f"--only '{name}'" for name in names)]
    words += [] if group.data in DATA else [f"--data {group.data}"]
    words += [] if set(networks) <= set(NETWORKS) else [f"--network {network}" for network in networks]
    words += [f"--recipe {group.recipe_name}"] + ([] if group.epochs is None else [f"--epochs {group.epochs}"])
    return " ".join([*words, f"--seeds {seeds}", *options])


def _places(results: Sequence[CellResult]) -> list[str]:
    """Machines and versions, and the cells that were begun on one and gone on with on another."""
    found: dict[tuple[str, ...], list[CellResult]] = {}
    for result in results:
        found.setdefault(result.provenance.places, []).append(result)
    lines = []
    for places, cells in sorted(found.items()):
        hours = sum(cell.seconds for cell in cells) / 3600
        counted = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}, {hours:.1f} hours of training"
        moved = "" if len(places) == 1 else f" ({', '.join(sorted(cell.name for cell in cells))})"
        lines += paragraph(f"- {', then '.join(places)}: {counted}{moved}")
    return lines


def _times(groups: Sequence[Group]) -> list[str]:
    rows = [
        [
            title_of(group.data),
            group.recipe,
            title_of_network(network),
            *(_time(group.of(network, strategy)) for strategy in STRATEGIES),
        ]
        for group in groups
        for network in group.networks(NETWORKS)
    ]
    return markdown_table(["data", "recipe", "network", *map(label, STRATEGIES)], rows)


def _time(runs: Sequence[CellResult]) -> str:
    if not runs:
        return "–"
    epochs = "/".join(str(number) for number in sorted({run.epochs for run in runs}))
    return f"{statistics.fmean(run.seconds for run in runs) / 60:.1f} ({epochs})"
