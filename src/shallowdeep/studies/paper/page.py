"""The page of the paper's table: written from the cells' results, and from nothing else."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from shallowdeep.errors import FileFormatError
from shallowdeep.storage import write_text
from shallowdeep.studies.paper.attacks import backdoor_undone
from shallowdeep.studies.paper.claims import Verdict, judge, judge_mixed, reasons_against
from shallowdeep.studies.paper.comparison import compare_with_published
from shallowdeep.studies.paper.evidence import counted_as, reaches
from shallowdeep.studies.paper.layout import (
    COLUMNS,
    Group,
    counts_text,
    flaws_of,
    groups_of,
    markdown_table,
    mean_of_met,
    mean_over,
    paragraph,
    percent,
    title_of_network,
)
from shallowdeep.studies.paper.matrix import DATA, NETWORKS
from shallowdeep.studies.paper.reproduction import show_how
from shallowdeep.studies.paper.savings import show_savings
from shallowdeep.studies.paper.sections import (
    compare_answers,
    compare_thresholds,
    show_confusion,
    show_exits,
    show_overthinking,
)
from shallowdeep.studies.paper.targets import show_targets
from shallowdeep.studies.results import BackdoorResult, CellResult, find_backdoors, read_backdoor, read_results
from shallowdeep.studies.tasks import title_of


def write_page(
    results: str | os.PathLike[str], out: str | os.PathLike[str], backdoors: Iterable[str | os.PathLike[str]] = ()
) -> int:
    """Write the page, whole or not at all; the same results give the same page.

    Args:
        results: folder with the cells' results, and in ``backdoor/`` those of attacked runs.
        out: Markdown file to write.
        backdoors: ``results/backdoor.json`` of attacked runs that lie elsewhere.

    Returns:
        Number of cells on it.

    Raises:
        FileFormatError: there are no results, or some are damaged; all of them are named.
    """
    cells = read_results(results)
    if not cells:
        raise FileFormatError(f"no results under {results}. Run some cells: shallowdeep study paper --list")
    beside = find_backdoors(results)
    known = {path.resolve() for path in beside}
    given = sorted({path for path in map(Path, backdoors) if path.resolve() not in known})
    write_text(out, page_of(cells, [read_backdoor(path) for path in (*beside, *given)], num_given=len(given)))
    return len(cells)


def page_of(results: Sequence[CellResult], backdoors: Sequence[BackdoorResult] = (), *, num_given: int = 0) -> str:
    """The page as Markdown.

    Args:
        results: of the cells.
        backdoors: of attacked runs.
        num_given: how many of these lie elsewhere than beside the cells' results.
    """
    groups = groups_of(results, DATA)
    lines = ["# The paper's table, run again", "", *_intro(results, groups)]
    for data in dict.fromkeys([*DATA, *(group.data for group in groups)]):
        lines += ["", f"## {title_of(data)}", "", *_of_data(data, [group for group in groups if group.data == data])]
    lines += ["", "## The claims", "", *_claims(results, backdoors)]
    for title, section in (
        ("Saved at the plain network's accuracy", show_savings),
        ("Thresholds from validation, beside thresholds from test", compare_thresholds),
        ("Unsure images: the last answer, or the most confident one", compare_answers),
        ("Exit by exit", show_exits),
        ("Overthinking", show_overthinking),
        ("Confusion", show_confusion),
        ("Published figures beside ours", compare_with_published),
        ("Figures to beat", show_targets),
    ):
        lines += ["", f"## {title}", "", *section(groups)]
    lines += ["", "## How it was run", "", *show_how(groups, num_given)]
    return "\n".join(lines) + "\n"


def _intro(results: Sequence[CellResult], groups: Sequence[Group]) -> list[str]:
    missing = [title_of(data) for data in DATA if all(group.data != data for group in groups)]
    hours = sum(result.training_seconds for result in results) / 3600
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


def _of_data(data: str, groups: Sequence[Group]) -> list[str]:
    if not groups:
        return ["No cell of it has been run yet."]
    lines = [*_about(groups), "", *_budget_table(groups, ("ic_only", "joint"))]
    if any(result.strategy == "mixed" for group in groups for result in group.results):
        lines += ["", "Mixed training, with the plain phase counted as its own cell:", ""]
        lines += _budget_table(groups, ("mixed",))
    missing = [name for name in NETWORKS if all(name not in group.networks(NETWORKS) for group in groups)]
    if data in DATA and missing:
        lines += ["", f"Not run yet: {', '.join(map(title_of_network, missing))}."]
    return lines


def _about(groups: Sequence[Group]) -> list[str]:
    results = [result for group in groups for result in group.results]
    seeds = sorted({result.config.seed for result in results})
    tested = sorted({result.n_test for result in results})
    lines = paragraph(
        f"""Seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}; {", ".join(f"{n:,}" for n in tested)} test
        images. In each cell IC-only left, joint right; small, the cost that came out on the test images. **Bold**: at
        or above the plain network (CNN) of the same recipe and seed. *none*: no threshold is that cheap."""
    )
    for group in groups:
        if group.is_cross_fitted:
            lines += (
                "",
                *paragraph(
                    f"""Under {group.recipe}, all training images were trained on, so thresholds come from cross-fitted
                halves of the test images: each half is answered with the threshold that the other chose."""
                ),
            )
        if flaws := "; ".join(flaws_of(group)):
            lines += "", *paragraph(f"**Not comparable with published figures:** {group.recipe} ({flaws}).")
    return lines


def _budget_table(groups: Sequence[Group], strategies: Sequence[str]) -> list[str]:
    rows = []
    for network in dict.fromkeys([*NETWORKS, *(name for group in groups for name in group.networks(NETWORKS))]):
        for group in groups:
            counts = [len(group.of(network, strategy)) for strategy in ("plain", *strategies)]
            if not any(counts[1:] if strategies == ("mixed",) else counts):
                continue
            plain = group.of(network, "plain")
            cells = [
                " · ".join(_within(group.of(network, strategy), plain, budget) for strategy in strategies)
                for budget, _ in COLUMNS
            ]
            names = [title_of_network(network), group.recipe, counts_text(counts)]
            rows.append([*names, mean_over(plain, lambda run: run.accuracy), *cells])
    return markdown_table(["network", "recipe", "runs", "CNN", *(title for _, title in COLUMNS)], rows)


def _within(runs: Sequence[CellResult], plain: Sequence[CellResult], budget: float | None) -> str:
    """Accuracy within a budget in the mean over seeds, its cost, in bold where the plain network is not better."""
    rows = [(run, row) for run in runs if (row := run.within(budget)) is not None]
    met = [(run, row.accuracy, row.cost) for run, row in rows if row.accuracy is not None and row.cost is not None]
    text = mean_of_met([row.accuracy for _, row in rows])
    if not met or len(met) < len(rows):
        return text
    by_seed = {run.config.seed: run.accuracy for run in plain}
    gains = [accuracy - by_seed[run.config.seed] for run, accuracy, _ in met if run.config.seed in by_seed]
    text = f"**{text}**" if gains and reaches(sum(gains), 0.0) else text
    return f"{text} <sub>{percent(sum(cost for _, _, cost in met) / len(met), 1)}</sub>"


def _claims(results: Sequence[CellResult], backdoors: Sequence[BackdoorResult]) -> list[str]:
    lines = paragraph(
        f"""Each verdict ends with the rule that it was found by. *Undecided*: what was run cannot tell. No run is left
        out for its outcome. {_judged(results)}"""
    )
    lines += _bullets([*judge(results), backdoor_undone(backdoors)])
    lines += [
        "",
        *paragraph(
            """The same asked of mixed training, which is not the paper's; with the plain network that it goes on from,
            it takes twice the training:"""
        ),
    ]
    lines += _bullets(judge_mixed(results))
    left: dict[str, list[str]] = {}
    for result in results:
        if reasons := reasons_against(result):
            left.setdefault("; ".join(reasons), []).append(result.name)
    if left:
        lines += ["", "Left out of all verdicts:"]
    for reason, names in sorted(left.items()):
        lines += ["", *paragraph(f"- {reason}: {', '.join(sorted(names))}")]
    return lines


def _bullets(verdicts: Sequence[Verdict]) -> list[str]:
    """Each verdict after an empty line."""
    bullets = [
        f"- **{verdict.word.capitalize()}.** *{verdict.claim}* {verdict.found}"
        + (f" Rule: {verdict.rule[:1].lower()}{verdict.rule[1:]}" if verdict.rule else "")
        for verdict in verdicts
    ]
    return [line for bullet in bullets for line in ("", *paragraph(bullet))]


def _judged(results: Sequence[CellResult]) -> str:
    """How many runs the verdicts rest on, and of what lengths."""
    lengths = Counter((r.config.recipe.name, r.length) for r in results if not reasons_against(r))
    if not lengths:
        return "No run so far tests any."
    parts = [f"{length} epochs ({recipe}, {counted_as(n, 'run')})" for (recipe, length), n in sorted(lengths.items())]
    return (
        f"The verdicts rest on networks trained for {', '.join(parts)}; IC-only counts with the plain network it "
        f"starts from, and runs with label smoothing say nothing of savings, gains and confusion."
    )
