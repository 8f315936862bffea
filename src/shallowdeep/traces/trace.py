"""The Trace: per-exit logits of one data split, with labels, ids and costs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shallowdeep.data.labels import LabelTree
from shallowdeep.errors import FileFormatError, TraceError
from shallowdeep.networks.costs import Costs
from shallowdeep.storage import load_tensors, save_tensors


@dataclass(frozen=True)
class TraceInfo:
    """Where a Trace comes from.

    Attributes:
        model: name of the network, or its class.
        data: name of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``; thresholds are not chosen on ``"test"``.
        label_spaces: name to number of outputs, in the order of the columns.
        class_names: of the labels.
        tree: fine to coarse labels, where there are any.
        precision: the arithmetic it was recorded with, e.g. ``"fp32"``.
        strategy: how the exits were trained.
        versions: of the software that recorded it.
    """

    model: str = ""
    data: str = ""
    split: str = ""
    label_spaces: Mapping[str, int] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    tree: LabelTree | None = None
    precision: str = "fp32"
    strategy: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; ``from_dict`` reads them back."""
        return {**asdict(self), "tree": None if self.tree is None else self.tree.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TraceInfo:
        """Read back what ``to_dict`` gave."""
        tree = None if values["tree"] is None else LabelTree.from_dict(values["tree"])
        return cls(**{**values, "tree": tree, "class_names": tuple(values["class_names"])})


@dataclass(frozen=True)
class Trace:
    """Per-exit logits of one data split.

    Attributes:
        logits: one ``(n, outputs)`` tensor per exit, shallow to deep; exits may have different widths.
        labels: true classes, shape ``(n,)``, or ``None``.
        ids: of the samples, unique, shape ``(n,)``.
        costs: FLOPs and parameters to each exit.
        info: where it comes from.

    Raises:
        TraceError: lengths, label range, ids or costs do not fit together, or logits are not finite.
    """

    logits: tuple[Float[Tensor, "n _"], ...]
    labels: Int[Tensor, " n"] | None
    ids: Int[Tensor, " n"]
    costs: Costs
    info: TraceInfo = TraceInfo()

    def __post_init__(self) -> None:
        lengths = {len(logits) for logits in self.logits} | {len(self.ids)}
        lengths |= set() if self.labels is None else {len(self.labels)}
        if not self.logits or len(lengths) != 1 or len(self.ids) == 0:
            raise TraceError(
                f"a Trace needs the same number of samples, at least 1, everywhere; got {sorted(lengths)}."
            )
        if self.costs.num_exits != len(self.logits):
            raise TraceError(f"the Trace has {len(self.logits)} exits, its costs have {self.costs.num_exits}.")
        if len(self.ids.unique()) != len(self.ids):
            raise TraceError(f"{len(self.ids) - len(self.ids.unique())} ids occur twice; every sample has its own.")
        if not all(bool(logits.isfinite().all()) for logits in self.logits):
            raise TraceError("some logits are not finite; the network diverged or overflowed.")
        if self.labels is not None and (self.labels.min() < 0 or self.labels.max() >= self.num_outputs):
            low, high = int(self.labels.min()), int(self.labels.max())
            raise TraceError(f"labels run from {low} to {high}, the last exit has outputs 0 to {self.num_outputs - 1}.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_exits(self) -> int:
        """Number of exits, the last included."""
        return len(self.logits)

    @property
    def num_outputs(self) -> int:
        """Columns of the last exit's logits."""
        return self.logits[-1].shape[1]

    @cached_property
    def predictions(self) -> Int[Tensor, "n exits"]:
        """Each exit's most likely class: of its probabilities, which are what a policy answers with."""
        return torch.stack([p.argmax(-1) for p in self._probabilities()], dim=1)

    @cached_property
    def confidences(self) -> Float[Tensor, "n exits"]:
        """Each exit's largest softmax probability."""
        return torch.stack([p.amax(-1) for p in self._probabilities()], dim=1)

    def _probabilities(self) -> Iterator[Tensor]:
        if len(self.info.label_spaces) > 1:
            raise TraceError(
                f"the columns hold several label sets ({', '.join(self.info.label_spaces)}); an answer is in one."
            )
        return (logits.softmax(-1) for logits in self.logits)

    @cached_property
    def correct(self) -> Bool[Tensor, "n exits"]:
        """Whether each exit is right.

        Raises:
            TraceError: the Trace has no labels.
        """
        return self.predictions == self.true_labels[:, None]

    @property
    def true_labels(self) -> Int[Tensor, " n"]:
        """The labels; a TraceError where there are none."""
        if self.labels is None:
            raise TraceError("this needs labels, and the Trace has none. Record a labelled split.")
        return self.labels

    def select(self, rows: Int[Tensor, " m"] | Bool[Tensor, " n"]) -> Trace:
        """The same Trace with only some samples, by index or mask."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, logits=tuple(x[rows] for x in self.logits), labels=labels, ids=self.ids[rows])

    def select_exits(self, exits: Iterable[int]) -> Trace:
        """The same Trace with only some exits, by rising index; the last exit must stay."""
        exits = list(exits)
        if exits[-1:] != [self.num_exits - 1]:
            raise TraceError(f"exits {exits} leave out the last one, {self.num_exits - 1}.")
        if exits != sorted(set(exits)) or exits[0] < 0:
            raise TraceError(f"exits {exits} are not in order from 0, each once.")
        return replace(self, logits=tuple(self.logits[i] for i in exits), costs=self.costs.select(exits))

    @staticmethod
    def merge(parts: Sequence[Trace]) -> Trace:
        """One Trace of several parts of a split, ordered by id; a sample met twice is kept once."""
        if not parts:
            raise TraceError("there is nothing to merge.")
        if any(part.costs != parts[0].costs or part.info != parts[0].info for part in parts):
            raise TraceError("the parts come from different networks, data or splits.")
        ids = torch.cat([part.ids for part in parts])
        order = ids.argsort(stable=True)
        fresh = torch.cat([torch.ones(1, dtype=torch.bool), ids[order].diff() != 0])
        rows = order[fresh]
        labels = [part.labels for part in parts if part.labels is not None]
        if labels and len(labels) < len(parts):
            raise TraceError("some parts have labels, and some have none.")
        return replace(
            parts[0],
            logits=tuple(torch.cat(exits)[rows] for exits in zip(*(part.logits for part in parts), strict=True)),
            labels=torch.cat(labels)[rows] if labels else None,
            ids=ids[rows],
        )

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write the Trace as one safetensors file, whole or not at all.

        Args:
            path: where to; replaced when it exists.
            dtype: store the logits in this type, e.g. ``torch.float16`` to halve the file; decisions whose
                confidence lies within its rounding of a threshold may then differ.
        """
        tensors = {f"logits.{i}": logits if dtype is None else logits.to(dtype) for i, logits in enumerate(self.logits)}
        tensors["ids"] = self.ids
        if self.labels is not None:
            tensors["labels"] = self.labels
        info = {"costs": self.costs.to_dict(), "info": self.info.to_dict()}
        save_tensors(path, tensors, kind="trace", info=info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read back what ``save`` wrote; logits come back in float32.

        Raises:
            FileFormatError: the file is truncated, foreign or of a later version.
            TraceError: its parts do not fit together.
        """
        tensors, info = load_tensors(path, kind="trace")
        num_exits = sum(name.startswith("logits.") for name in tensors)
        try:
            return cls(
                logits=tuple(tensors[f"logits.{i}"].float() for i in range(num_exits)),
                labels=tensors.get("labels"),
                ids=tensors["ids"],
                costs=Costs.from_dict(info["costs"]),
                info=TraceInfo.from_dict(info["info"]),
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} lacks a part of a Trace, or has one too many: {error}.") from None
