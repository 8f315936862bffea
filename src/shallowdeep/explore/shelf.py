"""The test split's images to pick from, in groups that what was recorded tells apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.files.decode import decode
from shallowdeep.data.images import ImageSet
from shallowdeep.errors import DataError, UnknownName
from shallowdeep.policies.replay import Decisions
from shallowdeep.report.gallery import png_url
from shallowdeep.traces.trace import Trace


@dataclass(frozen=True)
class Group:
    """Samples that have something in common.

    Attributes:
        key: how the page asks for it.
        title: what that is.
        ids: of the samples, in the split's order.
    """

    key: str
    title: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Shelf:
    """Images of a split.

    Attributes:
        samples: the split.
        groups: of its samples; the first holds all of them.
        class_names: of the labels.
    """

    samples: ImageSet | EncodedImages
    groups: tuple[Group, ...]
    class_names: tuple[str, ...]

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {id: row for row, id in enumerate(self.samples.ids.tolist())}

    def show(self, key: str, start: int, count: int) -> dict[str, Any]:
        """Some samples of a group, as JSON-able values: id, label and image of each, and how many there are.

        Raises:
            UnknownName: there is no such group.
        """
        found = next((group for group in self.groups if group.key == key), None)
        if found is None:
            raise UnknownName("group of samples", key, [group.key for group in self.groups])
        shown = [
            {"id": id, "label": self.class_names[self.label(id)], "image": png_url(self.pixels(id))}
            for id in found.ids[start : start + count]
        ]
        return {"total": len(found.ids), "start": start, "samples": shown}

    def label(self, id: int) -> int:
        """A sample's true class.

        Raises:
            DataError: there is no such sample.
        """
        return int(self.samples.labels[self._row(id)])

    def pixels(self, id: int) -> UInt8[Tensor, "c h w"]:
        """What the network sees of a sample.

        Raises:
            DataError: there is no such sample, or it cannot be decoded.
        """
        row, samples = self._row(id), self.samples
        if isinstance(samples, ImageSet):
            return samples.images[row]
        image = decode(samples.store.read(id), samples.store.where(id))
        return torch.from_numpy(samples.preprocessing.apply(image).copy())

    def _row(self, id: int) -> int:
        if id not in self._rows:
            raise DataError(f"no sample {id} in the {self.samples.split} split. Pick one that the page shows.")
        return self._rows[id]


def group(samples: ImageSet | EncodedImages, test: Trace | None, decisions: Decisions | None) -> tuple[Group, ...]:
    """All samples; those that overthinking destroyed; by the first exit that is right; by the exit the policy takes.

    Args:
        samples: of the split.
        test: recorded of that split; ``None``: all samples are one group.
        decisions: of the policy on it, where it has labels or not.
    """
    groups = [Group("all", "all test images", tuple(samples.ids.tolist()))]
    if test is None:
        return tuple(groups)
    names = [*(f"exit {exit}" for exit in range(test.num_exits - 1)), "the last exit"]

    def add(key: str, title: str, mask: Tensor) -> None:
        groups.append(Group(key, title, tuple(test.ids[mask].tolist())))

    if test.labels is not None:
        right = test.correct
        known = right.int().cummax(1).values.bool()
        if test.num_exits > 1:
            add("destroyed", "lost by overthinking", known[:, -1] & ~right[:, -1])
        for exit, name in enumerate(names):
            before = known[:, exit - 1] if exit else torch.zeros(len(test), dtype=torch.bool)
            add(f"first-{exit}", f"first right at {name}", right[:, exit] & ~before)
        add("never", "right at no exit", ~known[:, -1])
    if decisions is not None and test.num_exits > 1:
        for exit in decisions.exits.unique().tolist():
            add(f"leaves-{exit}", f"the policy leaves at {names[exit]}", decisions.exits == exit)
    return tuple(groups)


def check_recorded(samples: ImageSet | EncodedImages, test: Trace) -> Trace:
    """A Trace that was recorded of these samples.

    Raises:
        DataError: it was not.
    """
    rows = dict(zip(samples.ids.tolist(), samples.labels.tolist(), strict=True))
    labels = [None] * len(test) if test.labels is None else test.labels.tolist()
    pairs = zip(test.ids.tolist(), labels, strict=True)
    if any(id not in rows or (label is not None and rows[id] != label) for id, label in pairs):
        raise DataError("the recorded test split is not this one. Record it anew: shallowdeep record")
    return test
