"""From a trained and recorded run to the figures of its cell."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from shallowdeep.analysis.budgets import BUDGETS, Budgets, cross_fit_budgets, measure_budgets
from shallowdeep.analysis.confusion import Confusion, measure_confusion
from shallowdeep.analysis.overthinking import measure_overthinking
from shallowdeep.config import RunConfig
from shallowdeep.errors import FileFormatError, TraceError
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.runs.run import Run
from shallowdeep.storage import parse_json, read_json
from shallowdeep.studies.results import CellResult, Provenance, Start
from shallowdeep.traces.trace import Trace

STEPS = tuple(step / 40 for step in range(4, 41))
"""Budgets of the curve: from a tenth of the plain network's cost to all of it, in steps of 2.5 %."""
_OF_A_START = ("started", "python", "versions", "processor", "cores", "threads", "accelerator")


def measure(
    run: Run,
    sdn: ShallowDeepNetwork,
    traces: Mapping[str, Trace],
    *,
    name: str,
    strategy: str,
    config: RunConfig,
    command: Sequence[str],
) -> CellResult:
    """Everything a cell reports, from its Traces, its history and its environment.

    Args:
        run: trained and recorded.
        sdn: its network.
        traces: ``test`` and ``train``, and ``val`` where the data has such a split.
        name: of the cell.
        strategy: as the study calls it.
        config: as the result shall have it.
        command: arguments of ``shallowdeep`` that make the cell again.

    Raises:
        FileFormatError: the run's history or environment is damaged.
    """
    test, val = traces["test"], traces.get("val")
    confusion, notes = _confusion(test, traces["train"])
    history = read_history(run)
    return CellResult(
        name=name,
        strategy=strategy,
        config=config,
        n_train=len(run.load_data().train),
        n_val=0 if val is None else len(val),
        n_test=len(test),
        taps=tuple(sdn.taps),
        plain_flops=float(test.costs.backbone_flops[-1]),
        costs=tuple(test.costs.relative().tolist()),
        val_accuracy=None if val is None else tuple(val.correct.double().mean(0).tolist()),
        overthinking=measure_overthinking(test),
        budgets=_budgets(val, test, BUDGETS),
        budgets_as_published=_budgets(val, test, BUDGETS, "most_confident"),
        curve=_budgets(val, test, STEPS),
        confusion=confusion,
        notes=notes,
        epochs=len(history),
        seconds=seconds_of(history),
        epoch_seconds=median_epoch(history),
        precisions=tuple(dict.fromkeys(record["precision"] for record in history if "precision" in record)),
        provenance=_provenance(run, command),
    )


def read_history(run: Run) -> list[dict[str, Any]]:
    """A run's records, one per epoch.

    Raises:
        FileFormatError: the file is missing or damaged.
    """
    path = run.folder / "history.jsonl"
    try:
        records = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not records or not all(isinstance(r, dict) and isinstance(r["seconds"], float | int) for r in records):
            raise ValueError("it has no records of epochs")
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"cannot read {path} as a run's history ({error}). Put back what the training wrote, "
            "or remove the run folder to train again."
        ) from None
    return records


def seconds_of(history: Sequence[Mapping[str, Any]]) -> float:
    """That all epochs took, and the recording of features for them."""
    return sum(float(record["seconds"]) + float(record.get("features_seconds", 0.0)) for record in history)


def median_epoch(history: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of an epoch: those of one that was stopped in its middle say nothing of the others."""
    return statistics.median(float(record["seconds"]) for record in history)


def _budgets(val: Trace | None, test: Trace, budgets: Sequence[float | None], answer: str = "last") -> Budgets | None:
    if test.num_exits == 1:
        return None
    if val is None:
        return cross_fit_budgets(test, budgets=budgets, answer=answer)
    return measure_budgets(val, test, budgets=budgets, answer=answer)


def _confusion(test: Trace, train: Trace) -> tuple[Confusion | None, tuple[str, ...]]:
    if test.num_exits == 1:
        return None, ()
    try:
        return measure_confusion(test, train), ()
    except TraceError as error:  # a network without errors is no reason to lose the rest
        return None, (f"confusion is not measured: {error}",)


def _provenance(run: Run, command: Sequence[str]) -> Provenance:
    path = run.folder / "environment.json"
    values = read_json(path)
    try:
        earlier = [_start(start, "--compile" in shlex.split(start["command"])) for start in values.get("earlier", [])]
        return Provenance(
            command=shlex.join(["shallowdeep", *command]),
            starts=(*earlier, _start(values, run.config.compile)),
            data_md5=values["data_md5"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path} describes no environment ({error}). Put back what the training wrote, "
            "or remove the run folder to train again."
        ) from None


def _start(values: Mapping[str, Any], compiled: bool) -> Start:
    return Start(revision=values.get("revision"), compiled=compiled, **{name: values[name] for name in _OF_A_START})
