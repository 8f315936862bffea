"""The Trace: per-exit logits of one data split, with labels, ids and costs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shallowdeep.data.labels import LabelTree
from shallowdeep.errors import FileFormatError, TraceError
from shallowdeep.networks.calls import first_line
from shallowdeep.networks.costs import Costs
from shallowdeep.storage import load_tensors, read_as, save_tensors


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

    @classmethod
    def from_logits(
        cls,
        per_exit_logits: Iterable[Any],
        labels: Any = None,
        costs: Costs | Iterable[int | float] | None = None,
        *,
        ids: Any = None,
        split: str = "",
        class_names: Iterable[str] = (),
        model: str = "",
        data: str = "",
        probabilities: bool = False,
    ) -> Trace:
        """A Trace of anybody's multi-exit model, from its logits.

        Args:
            per_exit_logits: one array ``(n, outputs)`` per exit, shallow to deep, of NumPy, PyTorch, JAX,
                TensorFlow or anything that ``numpy.asarray`` takes.
            labels: true classes ``(n,)``, whole numbers; ``None``: there are none.
            costs: total cost up to each exit in any unit (FLOPs, milliseconds), the last being the plain network's;
                or ``Costs``. There is no default: exits in equal steps would be an invention.
            ids: of the samples; ``None``: their number in order.
            split: ``"train"``, ``"val"`` or ``"test"``; thresholds are not chosen on ``"test"``.
            class_names: of the labels.
            model: name of the model.
            data: name of the data set.
            probabilities: the arrays hold probabilities; their logarithms are kept.

        Raises:
            TraceError: the arrays, labels, ids or costs do not fit together, or costs are missing.

        >>> trace = Trace.from_logits([[[2.0, 0.0]], [[0.0, 1.0]]], labels=[1], costs=[0.4, 1.0])
        >>> trace.correct
        tensor([[False,  True]])
        """
        logits = tuple(_matrix(array, number, probabilities) for number, array in enumerate(per_exit_logits))
        if costs is None:
            raise TraceError("costs are missing. Pass the total cost up to each exit, e.g. costs=[0.3, 0.7, 1.0].")
        found = None if labels is None else _vector(labels, "labels")
        return cls(
            logits,
            found,
            torch.arange(len(logits[0]) if logits else 0) if ids is None else _vector(ids, "ids"),
            costs if isinstance(costs, Costs) else Costs.from_totals(costs),
            TraceInfo(model=model, data=data, split=split, class_names=tuple(class_names)),
        )

    @staticmethod
    def cascade(small: Trace, large: Trace) -> Trace:
        """One Trace of two separately trained networks: all exits of the small one, then all of the large one.

        Whoever is not stopped by the small network runs the large one from its beginning. The cost of the
        large network alone is 1.0, so running both to the end costs more.

        Args:
            small: of the network that runs first, every sample.
            large: of the same samples, in any order.

        Returns:
            The Trace, in the order of ``large``; its split is that of both, or of the one that says it.

        Raises:
            TraceError: the samples, labels, splits or widths of the two differ.
        """
        first = small.select(same_samples(small, large))
        if small.num_outputs != large.num_outputs:
            raise TraceError(
                f"the two Traces have {small.num_outputs} and {large.num_outputs} outputs. "
                "Record networks of the same classes."
            )
        return replace(
            large,
            logits=first.logits + large.logits,
            labels=large.labels if large.labels is not None else first.labels,
            costs=_stacked(small.costs, large.costs),
            info=replace(
                large.info,
                model=f"{small.info.model or 'small'} + {large.info.model or 'large'}",
                split=large.info.split or small.info.split,
            ),
        )

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
        refuse_label_sets(self)
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

    def as_agreement(self) -> Trace:
        """The same Trace with the last exit's answers for labels: accuracy then is agreement with them."""
        return replace(self, labels=self.predictions[:, -1])

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

        Raises:
            TraceError: ``dtype`` is no floating-point type, or does not hold the logits.
        """
        tensors = {f"logits.{i}": _stored_as(dtype, logits, i) for i, logits in enumerate(self.logits)}
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
                logits=tuple(_stored_logits(tensors[f"logits.{i}"], path) for i in range(num_exits)),
                labels=_vector(tensors["labels"], "labels") if "labels" in tensors else None,
                ids=_vector(tensors["ids"], "ids"),
                costs=read_as(Costs, info["costs"]),
                info=read_as(TraceInfo, info["info"]),
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(
                f"{path} lacks a part of a Trace, or has one too many: {first_line(error)}."
            ) from None


def _stored_as(dtype: torch.dtype | None, logits: Tensor, exit: int) -> Tensor:
    if dtype is None:
        return logits
    if not dtype.is_floating_point:
        raise TraceError(f"logits are stored in a floating-point type, got dtype={dtype}. Use torch.float16.")
    most = logits.abs().max()
    if most > torch.finfo(dtype).max:
        raise TraceError(
            f"the logits of exit {exit} reach {most:.3g}, which {dtype} does not hold. Use torch.bfloat16, or leave "
            "dtype= out."
        )
    return logits.to(dtype)


def _stored_logits(tensor: Tensor, path: object) -> Tensor:
    if tensor.ndim != 2 or not tensor.shape[1] or not tensor.is_floating_point():
        raise FileFormatError(
            f"{path} is damaged: it has {tensor.dtype} of shape {tuple(tensor.shape)} for logits. Record it anew."
        )
    return tensor.float()


def _matrix(array: Any, number: int, probabilities: bool) -> Tensor:
    found = _own(array, torch.float32)
    if found.ndim != 2:
        raise TraceError(f"exit {number} has logits of shape {tuple(found.shape)}; give (samples, outputs).")
    if probabilities:
        if bool((found < 0).any()) or not torch.allclose(found.sum(1), torch.ones(len(found)), atol=1e-3):
            raise TraceError(f"exit {number} holds no probabilities: rows must sum to 1. Leave probabilities= out.")
        found = found.clamp_min(torch.finfo(torch.float32).tiny).log()
    return found


def _vector(array: Any, what: str) -> Tensor:
    found = torch.as_tensor(array if isinstance(array, Tensor) else np.asarray(array))
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise TraceError(f"{what} are {found.dtype} of shape {tuple(found.shape)}; give whole numbers, one per sample.")
    return _own(found, torch.int64)


def _own(array: Any, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU: what its owner does to an array later changes no Trace."""
    found = torch.as_tensor(array if isinstance(array, Tensor) else np.asarray(array))
    return found.detach().to("cpu", dtype, copy=True)


def refuse_label_sets(trace: Trace) -> None:
    """Raise a TraceError where the columns hold several label sets: a softmax over all of them means nothing."""
    if len(trace.info.label_spaces) > 1:
        raise TraceError(
            f"the columns hold several label sets ({', '.join(trace.info.label_spaces)}); an answer is in one."
        )


def same_samples(one: Trace, other: Trace) -> Int[Tensor, " n"]:
    """Rows of one Trace in the order of another's samples.

    Raises:
        TraceError: their ids, labels or splits differ; what one of them does not say is no difference.
    """
    splits = [trace.info.split for trace in (one, other) if trace.info.split]
    if len(set(splits)) > 1:
        raise TraceError(f"the two Traces are of the splits {' and '.join(splits)}. Record both on the same data.")
    order, wanted = one.ids.argsort(), other.ids.argsort()
    if not torch.equal(one.ids[order], other.ids[wanted]):
        raise TraceError("the two Traces hold different samples (by their ids). Record both on the same data.")
    rows = torch.empty_like(order)
    rows[wanted] = order
    if one.labels is not None and other.labels is not None and not torch.equal(one.labels[rows], other.labels):
        raise TraceError("the two Traces label the same samples differently. Record both on the same data.")
    return rows


def _stacked(small: Costs, large: Costs) -> Costs:
    """Costs of a cascade: the large network begins after the whole small one; alone it is 1.0."""
    flops, params = small.backbone_flops[-1], small.backbone_params[-1]
    return Costs(
        backbone_flops=small.backbone_flops + tuple(flops + value for value in large.backbone_flops),
        head_flops=small.head_flops + large.head_flops,
        backbone_params=small.backbone_params + tuple(params + value for value in large.backbone_params),
        head_params=small.head_params + large.head_params,
        plain_flops=large.plain_flops or large.backbone_flops[-1],
    )
