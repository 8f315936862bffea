"""Where a run's figures come from, as its folder tells: configuration, data, hardware, versions, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shallowdeep.report.missing import Missing, attempt
from shallowdeep.report.operating import options_of
from shallowdeep.runs.run import Run
from shallowdeep.storage import read_json

SHOWN = ("python", "processor", "accelerator", "cores", "threads", "processes", "started", "revision")


@dataclass(frozen=True)
class Origins:
    """What a figure's reader needs to know.

    Attributes:
        facts: name and value, in order.
        data_md5: split, part and fingerprint.
        config: the whole configuration, as JSON.
        policy: the run's policy, as JSON; ``None``: there is none.
        commands: that make the run and its figures again.
    """

    facts: tuple[tuple[str, str], ...]
    data_md5: tuple[tuple[str, str, str], ...]
    config: str
    policy: str | None
    commands: tuple[str, ...]


def find_origins(run: Run) -> Origins:
    """Read a run's provenance; what its files do not say is left out, or said to be missing."""
    environment = attempt(lambda: read_json(run.folder / "environment.json"))
    values = environment if isinstance(environment, dict) else {}
    facts = [("run folder", run.folder.name), *_choices(run)]
    if isinstance(environment, Missing):
        facts.append(("environment", environment.reason))
    facts += [(name, str(values[name])) for name in SHOWN if values.get(name) is not None]
    versions = values.get("versions")
    if isinstance(versions, Mapping):
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    earlier = values.get("earlier")
    if isinstance(earlier, list) and earlier:
        facts.append(("resumed", f"{len(earlier)} times; earlier starts are in environment.json"))
    path = run.folder / "policy.json"
    policy = attempt(lambda: json.dumps(read_json(path))) if path.exists() else None
    return Origins(
        tuple(facts),
        tuple(_fingerprints(values.get("data_md5"))),
        json.dumps(run.config.model_dump(mode="json"), indent=2, ensure_ascii=False),
        policy.reason if isinstance(policy, Missing) else policy,
        _commands(run, values.get("command"), has_policy=path.exists()),
    )


def _choices(run: Run) -> list[tuple[str, str]]:
    config = run.config
    recipe = config.recipe.name + ("" if config.recipe.epochs is None else f", {config.recipe.epochs} epochs")
    chosen = [
        ("data", config.data),
        ("network", config.network),
        ("strategy", config.strategy),
        ("recipe", recipe),
        ("seed", str(config.seed)),
    ]
    return chosen if config.init is None else [*chosen, ("backbone from", config.init)]


def _fingerprints(found: Any) -> list[tuple[str, str, str]]:
    if not isinstance(found, Mapping):
        return []
    return [
        (str(split), str(part), str(md5))
        for split, parts in found.items()
        if isinstance(parts, Mapping)
        for part, md5 in parts.items()
    ]


def _commands(run: Run, training: Any, *, has_policy: bool) -> tuple[str, ...]:
    name = shlex.quote(_trained_into(run, training))
    commands = [training] if isinstance(training, str) else []
    commands += [f"shallowdeep record {name}", f"shallowdeep analyze {name}"]
    if has_policy:
        options = shlex.join(_asked_of_calibration(run))
        chosen = f"shallowdeep calibrate {name} {options or '…'}"
        commands += [chosen if options else f"# {name}/policy.json as above, or chosen anew: {chosen}"]
        commands += [f"shallowdeep replay {name}"]
    return (*commands, *_of_benchmark(run))


def _trained_into(run: Run, training: Any) -> str:
    """The folder that the command that trained it names, so that those after it go on with that; else the run's own."""
    try:
        words = shlex.split(training.replace("--out=", "--out ")) if isinstance(training, str) else []
    except ValueError:  # a quote without an end
        words = []
    places = [after for word, after in pairwise(words) if word == "--out"] if words[1:2] == ["fit"] else []
    return places[-1] if places else run.folder.name


def _asked_of_calibration(run: Run) -> list[str]:
    """Options of the calibration that chose the run's policy; none where another way chose it."""
    calibration = attempt(lambda: read_json(run.folder / "results" / "calibration.json"))
    policy = attempt(lambda: read_json(run.folder / "policy.json"))
    if not isinstance(calibration, dict) or calibration.get("policy") != policy:
        return []
    return options_of(calibration)


def _of_benchmark(run: Run) -> list[str]:
    commands = []
    for path in run.benchmarks:
        found = attempt(lambda path=path: read_json(path))
        measured_on = found.get("measured_on") if isinstance(found, dict) else None
        command = measured_on.get("command") if isinstance(measured_on, dict) else None
        commands += [command] if isinstance(command, str) else []
    return commands
