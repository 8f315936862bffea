"""A batch in any of the forms that loaders give, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.data.pytrees import row_counts
from shallowdeep.data.samples import Batch
from shallowdeep.errors import DataError


def read_batch(batch: Any, where: str, *, num_classes: int = 0, first_id: int = 0) -> Batch:
    """Inputs, labels and ids of a batch, where its maker left them.

    Args:
        batch: ``(inputs, labels)``, ``(inputs, labels, ids)``, a mapping with an entry ``labels`` or ``label``, or
            the inputs alone.
        where: what the batch is called in errors.
        num_classes: labels must be below; 0: not known.
        first_id: the first row's id, where the batch brings none; the others count on.

    Raises:
        DataError: the batch has another form, its parts differ in rows, or a label is no class.

    >>> read_batch((torch.zeros(2, 3), [1, 0]), "this").labels
    tensor([1, 0])
    """
    inputs, labels, ids = _parts(batch, where)
    count = _count_rows(inputs, labels, ids, where)
    if labels is not None and count:
        _check_labels(labels, num_classes, where)
    ids = torch.arange(first_id, first_id + count) if ids is None else ids
    return Batch(inputs, None if labels is None else labels.long(), ids.long())


def _parts(batch: Any, where: str) -> tuple[Any, Tensor | None, Tensor | None]:
    labels = ids = None
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        named = [key for key in ("labels", "label") if key in inputs]
        labels = inputs.pop(named[0]) if named else None
    elif isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 3:
            raise DataError(
                f"{where} has {len(batch)} parts. Give (inputs, labels), (inputs, labels, ids) or the inputs alone; "
                "several inputs together as a tuple: ((first, second), labels)."
            )
        inputs, labels, ids = (*batch, None, None)[:3]
    else:
        inputs = batch
    return _as_tensors(inputs), _whole_numbers(labels, "labels", where), _whole_numbers(ids, "ids", where)


def _as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.as_tensor(value)
    if isinstance(value, Mapping):
        return {key: _as_tensors(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_as_tensors(part) for part in value)
    return value


def _whole_numbers(values: Any, what: str, where: str) -> Tensor | None:
    if values is None:
        return None
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{where}: the {what} are a {type(values).__name__}. Give int64, one per sample.") from None
    if found.ndim != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise DataError(
            f"{where}: the {what} are {found.dtype} of shape {tuple(found.shape)}. Give int64, one per sample."
        )
    return found


def _count_rows(inputs: Any, labels: Tensor | None, ids: Tensor | None, where: str) -> int:
    if not row_counts(inputs):
        raise DataError(f"{where}: the inputs hold no tensor. Give a tensor, or a tuple or mapping of tensors.")
    counts = row_counts((inputs, labels, ids))
    if len(counts) != 1:
        raise DataError(
            f"{where}: inputs have {_words(inputs)} rows, labels {_words(labels)}, ids {_words(ids)}. "
            "Give one row of every input, one label and one id for each sample."
        )
    return counts.pop()


def _words(value: Any) -> str:
    return " and ".join(map(str, sorted(row_counts(value)))) or "none"


def _check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or (num_classes and high >= num_classes):
        among = f"there are {num_classes} classes, counted from 0" if num_classes else "labels are counted from 0"
        raise DataError(f"{where}: no label {low if low < 0 else high}: {among}. Mend the labels, or num_classes.")
