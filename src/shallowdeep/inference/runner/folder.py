"""An exported folder, ready to run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.inference.answers import Answers, collect
from shallowdeep.inference.cascade import Cascade, Values
from shallowdeep.inference.runner.manifest import FORMS, MANIFEST, checked_file, read_manifest
from shallowdeep.inference.runner.sessions import RunnerError, Settings
from shallowdeep.inference.runner.stages import OneFile, OnnxStages, typed_thresholds


class Runner:
    """Answers batches from an exported folder, each sample leaving as soon as the policy in it says so.

    Args:
        folder: what ``export`` wrote.
        form: ``"stages"``, at any batch size; ``"single"``, the self-exiting file for one sample at a time;
            ``"batched"``, the self-exiting file for batches.
        thresholds: other numbers for the policy, by name, e.g. ``{"threshold": 0.9}``.
        micro_batch: rows run at a time; ``None``: all that come together.
        settings: of ONNX Runtime.

    Raises:
        RunnerError: a file of the folder is missing, damaged or does not fit the others, or ONNX Runtime does
            not take it.

    Usage::

        answers = Runner("out")(images)
    """

    def __init__(
        self,
        folder: str | Path,
        form: str = "stages",
        *,
        thresholds: Mapping[str, float | int] | None = None,
        micro_batch: int | None = 32,
        settings: Settings | None = None,
    ):
        if form not in FORMS:
            raise RunnerError(f"no form '{form}'. Use one of: {', '.join(FORMS)}.")
        if micro_batch is not None and micro_batch < 1:
            raise RunnerError(f"a micro-batch has at least one row, got micro_batch={micro_batch}.")
        self.folder, self.form = Path(folder), form
        self.settings = settings or Settings()
        self.manifest = read_manifest(self.folder)
        self.exits: list[int] = self.manifest["exits"]
        self.costs: list[float] = self.manifest["costs"]
        numbers = {**self.manifest["thresholds"], **(thresholds or {})}
        self._driver = self._stages(numbers, micro_batch) if form == "stages" else self._one_file(numbers, micro_batch)

    def __call__(self, images: Any) -> Answers:
        """Answer a batch.

        Args:
            images: ``(n, …)`` with n of at least 1, as the manifest's ``inputs`` say; of several inputs a mapping.

        Raises:
            RunnerError: the batch is empty, of another shape or type, or holds numbers that are not finite.
        """
        return self._driver.answer(self.check(images))

    def stream(self, batches: Iterable[Any], *, refill: bool = False) -> Iterator[Answers]:
        """Hand each answer out when its sample leaves; ``ids`` number the samples over all batches.

        Args:
            batches: of images; read one at a time.
            refill: samples that stay may wait for those of later batches and go on together.
        """
        values = (self.check(images) for images in batches)
        if isinstance(self._driver, OneFile):
            if refill:
                raise RunnerError("refill takes form='stages': one file answers a batch in one call.")
            found = self._driver.stream(values)
        else:
            found = self._driver.stream(values, refill=refill)
        for leaving in found:
            yield collect([leaving], self.exits, self.costs)

    def anytime(self, images: Any) -> Iterator[Answers]:
        """The best answer so far for every sample, exit by exit, until nobody is left in the network."""
        so_far: Answers | None = None
        for leaving in self.cascade.anytime(self.check(images)):
            here = collect([leaving], self.exits, self.costs)
            so_far = here if so_far is None else so_far.updated(here)
            yield so_far

    @property
    def cascade(self) -> Cascade:
        """What drives the stages.

        Raises:
            RunnerError: this runs one file.
        """
        if isinstance(self._driver, OneFile):
            raise RunnerError(f"this takes form='stages'; form='{self.form}' gives nothing out between its exits.")
        return self._driver

    def with_thresholds(self, thresholds: Mapping[str, float | int]) -> Runner:
        """The same sessions with other numbers for the policy."""
        other, driver = copy.copy(self), self._driver
        if isinstance(driver, OneFile):
            numbers = {**driver.thresholds, **typed_thresholds(driver.session, thresholds)}
            other._driver = replace(driver, thresholds=numbers)
        else:
            other._driver = replace(driver, stages=driver.stages.with_thresholds(thresholds))  # type: ignore[attr-defined]
        return other

    def check(self, images: Any) -> Values:
        """A batch by name, once it is known to be one."""
        expected = {one["name"]: one for one in self.manifest["inputs"]}
        if not isinstance(images, Mapping):
            if len(expected) > 1:
                raise RunnerError(f"the network takes {', '.join(expected)}: pass a mapping from name to array.")
            images = {next(iter(expected)): images}
        if images.keys() != expected.keys():
            raise RunnerError(f"the network takes {', '.join(expected)}; got {', '.join(images)}.")
        values = {name: np.asarray(value) for name, value in images.items()}
        for name, value in values.items():
            _check(name, value, expected[name])
        if len({len(value) for value in values.values()}) > 1:
            raise RunnerError(f"inputs differ in rows: { ({name: len(v) for name, v in values.items()}) }.")
        return values

    def _stages(self, thresholds: Mapping[str, float | int], micro_batch: int | None) -> Cascade:
        parts = self.manifest["stages"]
        models = [checked_file(self.folder, part) for part in parts]
        stages = OnnxStages(models, self.exits, thresholds, self.settings)
        for part, session in zip(parts, stages.sessions, strict=True):
            for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
                names = [value.name for value in found]
                if names != part[kind]:
                    raise RunnerError(
                        f"{part['file']} has the {kind} {', '.join(names)}; {MANIFEST} says {', '.join(part[kind])}. "
                        "They are not of one export: export anew."
                    )
        return Cascade(stages, self.costs, None, micro_batch)

    def _one_file(self, thresholds: Mapping[str, float | int], micro_batch: int | None) -> OneFile:
        part = self.manifest[self.form]
        if part is None:
            raise RunnerError(f"{self.folder} was exported without a {self.form} file. Use form='stages'.")
        session = self.settings.open(checked_file(self.folder, part), part["file"])
        numbers = typed_thresholds(session, thresholds)
        rows = 1 if self.form == "single" else micro_batch or sys.maxsize
        return OneFile(session, self.exits, self.costs, numbers, rows)


def _check(name: str, value: np.ndarray, expected: Mapping[str, Any]) -> None:
    shape = tuple(expected["shape"])
    if value.shape[1:] != shape or value.ndim == 0 or value.dtype != expected["dtype"]:
        raise RunnerError(
            f"{name} must be of shape (n, {', '.join(map(str, shape))}) and {expected['dtype']}, "
            f"got {value.shape} and {value.dtype}."
        )
    if len(value) == 0:
        raise RunnerError(f"{name} holds no sample: a batch has at least one.")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        rows = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))
        raise RunnerError(f"{name} holds numbers that are not finite, first in row {rows[0]} ({len(rows)} in all).")
