"""Arrays of ONNX Runtime on a device: what is done with their rows there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shallowdeep.inference.cascade import Values
from shallowdeep.inference.runner.sessions import DEVICES, Settings, load_onnxruntime

MOVERS: dict[str, str] = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
"""Who picks and joins rows on a kind of device; TensorRT would build an engine for every number of them."""


@dataclass(frozen=True)
class Device:
    """Arrays of ONNX Runtime on a device, and what is done with their rows there.

    ONNX Runtime has no operation outside a graph, so picking and joining rows are sessions of one node each, made
    when they are first wanted.

    Args:
        kind: as ONNX Runtime calls it, a key of ``MOVERS``.
        index: of several of a kind.
        settings: of the sessions; their providers do not count.
    """

    kind: str
    index: int
    settings: Settings
    _sessions: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def hold(self, value: Any) -> Any:
        """An array of numpy's as one on the device; one that is there already as it is."""
        if not isinstance(value, np.ndarray):
            return value
        return load_onnxruntime().OrtValue.ortvalue_from_numpy(np.asarray(value, order="C"), self.kind, self.index)

    def run(self, session: Any, names: Sequence[str], feeds: Values, staying: Callable[[str], bool]) -> list[Any]:
        """A session's outputs by name: of some that stay on the device, of others as numpy's."""
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, self.hold(value))
        for name in names:
            binding.bind_output(name, *((self.kind, self.index) if staying(name) else ("cpu",)))
        session.run_with_iobinding(binding)
        return [v if staying(n) else v.numpy() for n, v in zip(names, binding.get_outputs(), strict=True)]

    def take(self, value: Any, rows: np.ndarray) -> Any:
        """Some rows of an array, by index."""
        return self._move("Gather", [value, rows.astype(np.int64)])

    def join(self, values: Sequence[Any]) -> Any:
        """The rows of several arrays, one after another."""
        return self._move("Concat", values)

    def _move(self, kind: str, values: Sequence[Any]) -> Any:
        held = [self.hold(value) for value in values]
        types = tuple(value.data_type() for value in held)
        if (kind, types) not in self._sessions:
            own = replace(self.settings, providers=(MOVERS[self.kind],), device_id=self.index)
            self._sessions[kind, types] = own.open(one_node(kind, types), kind)
        feeds = {f"in_{place}": value for place, value in enumerate(held)}
        return self.run(self._sessions[kind, types], ["out"], feeds, lambda name: True)[0]


def take_rows(values: Values, rows: np.ndarray, device: Device | None = None) -> Values:
    """Some rows of every value, by index: of numpy's arrays here, of others on their device."""
    return {
        name: value[rows] if device is None or isinstance(value, np.ndarray) else device.take(value, rows)
        for name, value in values.items()
    }


def join_rows(parts: Sequence[Values], device: Device | None = None) -> Values:
    """The rows of several values, one after another: of numpy's arrays here, of others on their device."""
    joined: Values = {}
    for name, first in parts[0].items():
        some = [part[name] for part in parts]
        joined[name] = np.concatenate(some) if device is None or isinstance(first, np.ndarray) else device.join(some)
    return joined


ELEMENTS = {"float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9}
ELEMENTS |= {"float16": 10, "double": 11, "uint32": 12, "uint64": 13, "bfloat16": 16}
"""ONNX's numbers of types of elements."""


def one_node(kind: str, types: Sequence[str]) -> bytes:
    """An ONNX file of one node that works along the first axis, written without the onnx package.

    Args:
        kind: of node: ``"Gather"`` or ``"Concat"``.
        types: of its inputs ``"in_0"``, …, as ONNX Runtime calls them; ``"out"`` is of the first one's.

    The numbers are those of the fields in ``onnx.proto``.
    """
    names = [f"in_{place}" for place in range(len(types))]
    axis = _field(1, "axis") + _field(3, 0) + _field(20, 2)  # name, value, and that it is a whole number
    node = b"".join(_field(1, name) for name in names) + _field(2, "out") + _field(4, kind) + _field(5, axis)
    graph = _field(1, node) + _field(2, kind)
    for place, name, type in [*((11, *pair) for pair in zip(names, types, strict=True)), (12, "out", types[0])]:
        element = ELEMENTS[type.removeprefix("tensor(").removesuffix(")")]
        graph += _field(place, _field(1, name) + _field(2, _field(1, _field(1, element))))  # of any shape
    return _field(1, 8) + _field(8, _field(1, "") + _field(2, 13)) + _field(7, graph)  # IR version, opset, graph


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def device_of(settings: Settings) -> Device | None:
    """Where features stay from stage to stage under the first provider; ``None``: they are numpy's."""
    first = settings.numbered[0]
    if isinstance(first, str) or first[0] not in DEVICES:
        return None
    return Device(DEVICES[first[0]], int(first[1]["device_id"]), settings)
