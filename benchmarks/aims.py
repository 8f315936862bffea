"""What early exits were to reach on the clock, and what `shallowdeep bench` found: a table in Markdown.

    python benchmarks/aims.py RUN/results/bench-fp32-int8.json [MORE.json …]

The limits were set for a wide network (VGG-16) on two cores, with a policy that loses at most a point at half of the
cost. Several files of one run, such as one of each precision, make one table. A figure is the median of the rounds, its
middle half in brackets; an aim is held by the median. What was not timed is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEST = "best"


@dataclass(frozen=True)
class Aim:
    """A limit to one column of the benchmark's tables.

    Args:
        what: in words.
        column: of the engines' or the bounds' table.
        limit: not to be passed.
        at_least: the limit is the least, not the most.
        inverse: the column's figure stands the other way round.
        backend: one, or the one that comes out best.
        precision: of weights and arithmetic.
        batches: batch sizes.
    """

    what: str
    column: str
    limit: float
    at_least: bool = False
    inverse: bool = False
    backend: str = BEST
    precision: str = "fp32"
    batches: tuple[int, ...] = (1, 8, 32, 256)


AIMS = (
    Aim("of the time without exits", "of plain", 0.60, backend="onnx", batches=(32, 256)),
    Aim("of the time without exits", "of plain", 0.65, backend="onnx", precision="int8", batches=(32, 256)),
    Aim("of the time without exits", "of plain", 0.65, precision="bf16", batches=(32, 256)),
    Aim("of the latency without exits", "of plain", 0.65, backend="onnx", batches=(1,)),
    Aim("all stages over the whole in one piece", "stages / all exits", 1.05, backend="onnx"),
    Aim("engine over the sum of its stages", "of bound", 1.10, backend="eager"),
    Aim("engine over the sum of its stages", "of bound", 1.05),
    Aim("nobody exits, over the whole in one piece", "nobody / all exits", 1.03, backend="onnx"),
    Aim("× early exit one at a time", "× one at a time", 5.0, at_least=True, batches=(32,)),
    Aim("× plain eager fp32", "of eager plain", 20.0, at_least=True, inverse=True, precision="int8", batches=(1,)),
    Aim("× plain eager fp32", "of eager plain", 8.0, at_least=True, inverse=True, precision="int8", batches=(32,)),
)


def found(aim: Aim, reports: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Rows of the table, one for each batch size that was timed."""
    rows = [row for report in reports for row in (*report["engines"], *report["bounds"])]
    for batch in aim.batches:
        figures = {
            row["back end"]: turned(row[aim.column]) if aim.inverse else row[aim.column]
            for row in rows
            if row["batch"] == batch
            and row["precision"] == aim.precision
            and row.get(aim.column)
            and aim.backend in (BEST, row["back end"])
        }
        if not figures:
            continue
        name = (max if aim.at_least else min)(figures, key=lambda one: figures[one]["median"])
        median, low, high = (figures[name][key] for key in ("median", "low", "high"))
        held = median >= aim.limit if aim.at_least else median <= aim.limit
        yield {
            "what": aim.what,
            "back end": f"{name} (the best)" if aim.backend == BEST else name,
            "precision": aim.precision,
            "batch": str(batch),
            "aim": f"{'≥' if aim.at_least else '≤'} {aim.limit:g}",
            "measured": f"{median:.2f} ({low:.2f} to {high:.2f})",
            "held": "yes" if held else "**no**",
        }


def turned(figure: dict[str, float]) -> dict[str, float]:
    """A ratio's figures the other way round."""
    return {"median": 1 / figure["median"], "low": 1 / figure["high"], "high": 1 / figure["low"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().reports]
    if len({json.dumps(report["config"], sort_keys=True) for report in reports}) > 1:
        parser.error("these are benchmarks of several runs. A table is of one.")
    table = [row for aim in AIMS for row in found(aim, reports)]
    print("| " + " | ".join(table[0]) + " |\n" + "|---" * len(table[0]) + "|")
    for row in table:
        print("| " + " | ".join(row.values()) + " |")
    missing = [f"{aim.what} ({aim.precision})" for aim in AIMS if not any(found(aim, reports))]
    print(f"\nNot timed: {', '.join(missing)}." if missing else "")


if __name__ == "__main__":
    main()
