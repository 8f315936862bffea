"""What ONNX Runtime runs: stages one by one, or a file that lets samples leave by itself."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.inference.answers import Answers, Leaving, collect
from shallowdeep.inference.cascade import Step, Values
from shallowdeep.inference.runner.device import device_of, join_rows, take_rows
from shallowdeep.inference.runner.sessions import RunnerError, Settings

OUT = "_out"  # what a stage gives to a later one is named as it is there, with this behind it


class OnnxStages:
    """The stages of a network in ONNX Runtime, a session each (see ``Stages``).

    On a GPU features stay there from stage to stage, also where rows are dropped or joined.

    Args:
        models: shallow to deep, each a file or its bytes.
        exits: index of the exit that each ends at.
        thresholds: the policy's numbers by name.
        settings: of every session.
    """

    sizes: Sequence[int] | None = None

    def __init__(
        self,
        models: Sequence[str | Path | bytes],
        exits: Sequence[int],
        thresholds: Mapping[str, float | int] | None = None,
        settings: Settings | None = None,
    ):
        settings = settings or Settings()
        self.exits = list(exits)
        self.sessions = [
            settings.open(model, f"stage {place}" if isinstance(model, bytes) else Path(model).name)
            for place, model in enumerate(models)
        ]
        self.device = device_of(settings)
        self._inputs = [[value.name for value in session.get_inputs()] for session in self.sessions]
        self._outputs = [[value.name for value in session.get_outputs()] for session in self.sessions]
        self._wanted = [
            {name for later in self._inputs[place + 1 :] for name in later} for place in range(len(self.sessions))
        ]
        self._thresholds = typed_thresholds(self.sessions[0], thresholds or {})

    def with_thresholds(self, thresholds: Mapping[str, float | int]) -> OnnxStages:
        """The same sessions with other numbers for the policy."""
        other = copy.copy(self)
        other._thresholds = {**self._thresholds, **typed_thresholds(self.sessions[0], thresholds)}
        return other

    def run(self, stage: int, values: Values) -> Step:
        """Run one stage on at least one row."""
        session, names, device = self.sessions[stage], self._outputs[stage], self.device
        if device is not None:  # what later stages want too goes there once
            values = {name: device.hold(v) if name in self._wanted[stage] else v for name, v in values.items()}
        feeds = {name: self._thresholds.get(name, values.get(name)) for name in self._inputs[stage]}
        if device is None:
            outputs = session.run(names, feeds)
        else:
            outputs = device.run(session, names, feeds, lambda name: name.endswith(OUT))
        return step_of(dict(zip(names, outputs, strict=True)), values, self._wanted[stage])

    def fetch(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """``stop`` and ``scores``, which are on the host already."""
        return step.stop, step.scores

    def take(self, values: Values, rows: np.ndarray) -> Values:
        """Some rows of every value, by index."""
        return take_rows(values, rows, self.device)

    def join(self, parts: Sequence[Values]) -> Values:
        """The rows of several values, one after another."""
        return join_rows(parts, self.device)

    def wait(self) -> None:
        """Nothing is left to wait for: a session's run returns when its device is done."""


def step_of(found: Mapping[str, Any], values: Values, wanted: set[str]) -> Step:
    """What a stage's outputs by name are to those who drive it; of the inputs ``values``, what is wanted goes on."""
    given = {name.removesuffix(OUT): value for name, value in found.items() if name.endswith(OUT)}
    kept = {name: value for name, value in values.items() if name in wanted}
    return Step({**kept, **given}, found["stop"], found["scores"], found["logits"])


def typed_thresholds(session: Any, thresholds: Mapping[str, float | int]) -> Values:
    """A policy's numbers as a session's inputs want them.

    Raises:
        RunnerError: the session has no input of a name, or a number is none that its type holds.
    """
    kinds = {value.name: value.type for value in session.get_inputs() if not value.shape}
    found: Values = {}
    for name, number in thresholds.items():
        if name not in kinds:
            known = f"It has: {', '.join(kinds)}." if kinds else "It has none."
            raise RunnerError(f"the policy has no number named '{name}'. {known}")
        whole = kinds[name] == "tensor(int64)"
        if isinstance(number, bool) or not math.isfinite(number) or (whole and number != int(number)):
            raise RunnerError(f"{name} is {'a whole number' if whole else 'a finite number'}, got {number}.")
        found[name] = np.array(number, dtype=np.int64 if whole else np.float32)
    return found


@dataclass(frozen=True)
class OneFile:
    """A self-exiting file: all stages and the policy in one graph.

    Args:
        session: that runs it.
        exits: index of each exit where samples may leave.
        costs: of leaving there.
        thresholds: the policy's numbers, as the session takes them.
        rows: run at a time; the single file takes one, the other any number.
    """

    session: Any
    exits: Sequence[int]
    costs: Sequence[float]
    thresholds: Values
    rows: int = sys.maxsize

    def answer(self, inputs: Values) -> Answers:
        """Answer a batch of any size."""
        return collect(self.stream([inputs]), self.exits, self.costs)

    def stream(self, batches: Iterable[Values]) -> Iterator[Leaving]:
        """Hand samples out as they are answered, a run of the file at a time."""
        start = 0
        for values in batches:
            count = len(next(iter(values.values())))
            for first in range(0, count, self.rows):
                part = {name: value[first : first + self.rows] for name, value in values.items()}
                scores, left = self.session.run(["scores", "exit"], {**part, **self.thresholds})
                ids = start + first + np.arange(len(left))
                for exit in np.unique(left):
                    yield Leaving(int(exit), ids[left == exit], scores[left == exit])
            start += count
