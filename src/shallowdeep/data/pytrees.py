"""Tensors inside tuples, lists and mappings: what a network with several inputs takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure with every tensor replaced; what is no tensor stays as it is.

    A mapping comes back as a ``dict``, so that the caller may change it.

    >>> map_tensors(lambda x: x.ndim, {"a": Tensor([1]), "b": (Tensor([[1]]), "word")})
    {'a': 1, 'b': (2, 'word')}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, part) for part in value]
        return (
            type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        )  # a named tuple wants them apart
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a structure, in order.

    >>> [x.tolist() for x in tensors_in((Tensor([1]), {"a": [Tensor([2])]}))]
    [[1.0], [2.0]]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def take_rows(value: Any, rows: Any) -> Any:
    """Some rows of every tensor of a structure; a tensor without dimensions is left whole.

    Args:
        value: tensors with samples as rows.
        rows: a slice, or positions.

    >>> take_rows((Tensor([[1, 2], [3, 4]]), Tensor([5, 6])), slice(1, 2))
    (tensor([[3., 4.]]), tensor([6.]))
    """
    return map_tensors(lambda tensor: tensor[rows] if tensor.ndim else tensor, value)


def row_counts(value: Any) -> set[int]:
    """The numbers of rows of the structure's tensors: one number where they fit together."""
    return {len(tensor) for tensor in tensors_in(value) if tensor.ndim}


def to_channels_last(value: Any) -> Any:
    """Floating-point tensors of four dimensions in that memory format, all others as they are."""
    return map_tensors(_channels_last, value)


def _channels_last(tensor: Tensor) -> Tensor:
    image = tensor.ndim == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if image else tensor
