"""The page of the paper's table: written from the cells' results, and from nothing else."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from shallowdeep.analysis.backdoor import BackdoorEffect
from shallowdeep.errors import FileFormatError
from shallowdeep.storage import read_as, read_json, write_text
from shallowdeep.studies.claims import judge
from shallowdeep.studies.comparison import compare_with_published
from shallowdeep.studies.estimates import title_of
from shallowdeep.studies.layout import (
    BUDGETS,
    Group,
    groups_of,
    incomplete_note,
    label,
    markdown_table,
    mean_text,
    paragraph,
    percent,
    title_of_network,
)
from shallowdeep.studies.paper import DATA, NETWORKS
from shallowdeep.studies.results import CellResult, read_results
from shallowdeep.studies.sections import compare_thresholds, show_confusion, show_exits, show_overthinking


def write_page(
    results: str | os.PathLike[str], out: str | os.PathLike[str], backdoors: Iterable[str | os.PathLike[str]] = ()
) -> int:
    """Write the page, whole or not at all; the same results give the same page.

    Args:
        results: folder with the cells' results.
        out: Markdown file to write.
        backdoors: JSON files with what ``measure_backdoor`` found.

    Returns:
        Number of cells on it.

    Raises:
        FileFormatError: there are no results, or some are damaged; all of them are named.
    """
    cells = read_results(results)
    if not cells:
        raise FileFormatError(f"no results under {results}. Run some cells: shallowdeep study paper --list")
    write_text(out, page_of(cells, [_read_backdoor(path) for path in sorted(map(Path, backdoors))]))
    return len(cells)


def page_of(results: Sequence[CellResult], backdoors: Sequence[BackdoorEffect] = ()) -> str:
    """The page as Markdown."""
    groups = groups_of(results, DATA)
    lines = ["# The paper's table, run again", "", *_intro(results, groups)]
    for data in dict.fromkeys([*DATA, *(group.data for group in groups)]):
        lines += ["", f"## {title_of(data)}", "", *_of_data([group for group in groups if group.data == data])]
    lines += ["", "## The claims", "", *_claims(results, backdoors)]
    for title, section in (
        ("Thresholds from validation, beside thresholds from test", compare_thresholds),
        ("Exit by exit", show_exits),
        ("Overthinking", show_overthinking),
        ("Confusion", show_confusion),
        ("Published figures beside ours", compare_with_published),
        ("How it was run", _how),
    ):
        lines += ["", f"## {title}", "", *section(groups)]
    return "\n".join(lines) + "\n"


def _read_backdoor(path: Path) -> BackdoorEffect:
    try:
        return read_as(BackdoorEffect, read_json(path))
    except TypeError as error:
        raise FileFormatError(f"{path} is no result of a backdoor study ({error}).") from None


def _intro(results: Sequence[CellResult], groups: Sequence[Group]) -> list[str]:
    missing = [title_of(data) for data in DATA if all(group.data != data for group in groups)]
    hours = sum(result.seconds for result in results) / 3600
    lines = [
        *paragraph(
            """Shallow-Deep Networks (Kaya, Hong & Dumitras, ICML 2019) put internal classifiers, exits, on an
            off-the-shelf network, so that easy images leave early. The paper's main table asks what accuracy is left
            when an image may cost, in the mean, a quarter, a half or three quarters of the plain network. This page
            asks it again."""
        ),
        "",
        *paragraph(
            f"""{len(results)} trainings stand behind it, {hours:.1f} hours in all. A network is trained *plain*;
            *IC-only* training then adds exits and leaves it as it is; *joint* training learns network and exits
            together from the beginning; *mixed* goes on from the plain network with joint training. Figures are in per
            cent, of test images; a cost is a share of the plain network's FLOPs, the exits' own included. Thresholds
            are chosen on images other than those they are reported on. A dash is a cell that has not been run."""
        ),
    ]
    return lines if not missing else [*lines, "", f"Not run yet: {', '.join(missing)}."]


def _of_data(groups: Sequence[Group]) -> list[str]:
    if not groups:
        return ["No cell of it has been run yet."]
    lines = []
    for group in groups:
        lines += ["", f"### Recipe {group.recipe}", "", *_about(group), "", *_budget_table(group, ("ic_only", "joint"))]
        if any(group.of(network, "mixed") for network in group.networks(NETWORKS)):
            lines += ["", "Mixed training, with the plain phase counted as its own cell:", ""]
            lines += _budget_table(group, ("mixed",))
    return lines[1:]


def _about(group: Group) -> list[str]:
    seeds = sorted({result.config.seed for result in group.results})
    tested = sorted({result.n_test for result in group.results})
    lines = paragraph(
        f"""Seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}; {", ".join(f"{n:,}" for n in tested)} test
        images. In each cell IC-only left, joint right; small, the cost that came out on the test images. **Bold**: at
        or above the plain network (CNN) of the same seed. *none*: no threshold is that cheap."""
    )
    if group.is_cross_fitted:
        lines += paragraph(
            """All training images were trained on, so thresholds come from cross-fitted halves of the test images: each
            half is answered with the threshold that the other chose."""
        )
    note = incomplete_note(group)
    return lines if note is None else [*lines, "", *paragraph(f"**Not comparable with published figures:** {note}")]


def _budget_table(group: Group, strategies: Sequence[str]) -> list[str]:
    rows = []
    for network in group.networks(NETWORKS):
        plain = group.of(network, "plain")
        counts = [len(group.of(network, strategy)) for strategy in ("plain", *strategies)]
        present = sorted({count for count in counts if count})
        runs = str(present[0]) if len(present) == 1 else "/".join(map(str, counts)) if present else "–"
        cells = [
            " · ".join(_within(group.of(network, strategy), plain, budget) for strategy in strategies)
            for budget, _ in BUDGETS
        ]
        rows.append([title_of_network(network), runs, mean_text([run.accuracy for run in plain]), *cells])
    return markdown_table(["network", "runs", "CNN", *(title for _, title in BUDGETS)], rows)


def _within(runs: Sequence[CellResult], plain: Sequence[CellResult], budget: float | None) -> str:
    """Accuracy within a budget in the mean over seeds, its cost, in bold where the plain network is not better."""
    rows = [(run, row) for run in runs if (row := run.within(budget)) is not None]
    met = [(run, row.accuracy, row.cost) for run, row in rows if row.accuracy is not None and row.cost is not None]
    if not rows:
        return "–"
    if len(met) < len(rows):
        return "none" if not met else f"none in {len(rows) - len(met)} of {len(rows)}"
    by_seed = {run.config.seed: run.accuracy for run in plain}
    gains = [accuracy - by_seed[run.config.seed] for run, accuracy, _ in met if run.config.seed in by_seed]
    text = mean_text([accuracy for _, accuracy, _ in met])
    text = f"**{text}**" if gains and sum(gains) >= 0 else text
    return f"{text} <sub>{percent(sum(cost for _, _, cost in met) / len(met), 1)}</sub>"


def _claims(results: Sequence[CellResult], backdoors: Sequence[BackdoorEffect]) -> list[str]:
    lines = paragraph(
        """*Held*: so it is in the mean over all runs that test the claim. *Beaten*: more than was claimed was found. No
        run is left out for its outcome; runs on incomplete data, and for confusion runs with label smoothing, test
        nothing."""
    )
    for verdict in judge(results, backdoors):
        lines += ["", *paragraph(f"- **{verdict.word.capitalize()}.** *{verdict.claim}* {verdict.found}")]
    return lines


def _how(groups: Sequence[Group]) -> list[str]:
    strategies = ("plain", "ic_only", "joint", "mixed")
    rows = [
        [
            title_of(group.data),
            group.recipe,
            title_of_network(network),
            *(_time(group.of(network, strategy)) for strategy in strategies),
        ]
        for group in groups
        for network in group.networks(NETWORKS)
    ]
    results = [result for group in groups for result in group.results]
    places: dict[str, list[CellResult]] = {}
    for result in results:
        kept = result.provenance
        place = f"{kept.hardware}; PyTorch {kept.versions.get('torch', '?')}, Python {kept.python}"
        places.setdefault(place, []).append(result)
    lines = [
        *paragraph(
            """Each cell has a file under `results/paper/` with its configuration, figures, fingerprints of the data,
            revision and the command that makes it again. All cells of a group, and then this page:"""
        ),
        "",
        "```sh",
        *(_command(group) for group in groups),
        "shallowdeep study paper --table",
        "```",
        "",
    ]
    for place, cells in sorted(places.items()):
        hours = sum(cell.seconds for cell in cells) / 3600
        lines.append(f"- {place}: {len(cells)} cells, {hours:.1f} hours of training")
    return [
        *lines,
        "",
        *paragraph(
            """Minutes of training, and in brackets epochs, of each cell in the mean over seeds; validation is not
            counted, and a machine shared with other work shows. Mixed is without the plain phase that it goes on from,
            IC-only with the time to record what the exits see, where that was done."""
        ),
        "",
        *markdown_table(["data", "recipe", "network", *map(label, strategies)], rows),
    ]


def _command(group: Group) -> str:
    seeds = ",".join(str(seed) for seed in sorted({result.config.seed for result in group.results}))
    words = ["shallowdeep study paper", f"--only '{group.data}/*'"]
    words += [] if group.data in DATA else [f"--data {group.data}"]
    words += [f"--network {network}" for network in group.networks(NETWORKS) if network not in NETWORKS]
    words += [f"--recipe {group.recipe_name}"] + ([] if group.epochs is None else [f"--epochs {group.epochs}"])
    return " ".join([*words, f"--seeds {seeds}"])


def _time(runs: Sequence[CellResult]) -> str:
    if not runs:
        return "–"
    epochs = "/".join(str(number) for number in sorted({run.epochs for run in runs}))
    return f"{statistics.fmean(run.seconds for run in runs) / 60:.1f} ({epochs})"
