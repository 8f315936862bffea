"""What int8 stages hand over: eight bits with channels last, as ONNX Runtime's int8 kernels give and take them.

Quantised each by itself, two stages meet in float32 with channels first: the one before turns its features back, the
one behind quantises them again, on another scale. Here the one behind is quantised on the scale of the one before
(``scales_given``), and then both leave out the way to float32 and back (``in_eight_bits``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shallowdeep.errors import require
from shallowdeep.inference.onnx.fold import StageModel
from shallowdeep.inference.runner.stages import OUT

CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class Scale(NamedTuple):
    """How a tensor's eight bits are to be read: ``(bits - zero_point) * scale``."""

    scale: np.float32
    zero_point: np.uint8


def scales_given(model: StageModel) -> dict[str, Scale | None]:
    """What a quantised stage gives to later ones, by their name for it; ``None`` where it is not in eight bits."""
    graph = model.model.graph
    return {
        value.name.removesuffix(OUT): None if maker is None else _scale(graph, maker)
        for value in graph.output
        if value.name.endswith(OUT)
        for maker in [_dequantised(graph, value.name)]
    }


def in_eight_bits(models: Sequence[StageModel]) -> list[StageModel]:
    """Quantised stages that hand over eight bits where they can; feature maps ``(n, c, h, w)`` as ``(n, h, w, c)``.

    Args:
        models: shallow to deep; not changed.
    """
    held: dict[str, Scale | None] = {}
    found = []
    for stage in models:
        changed = copy.deepcopy(stage.model)
        for name, scale in held.items():
            if scale is not None:
                _take(changed.graph, name, scale)
        given = scales_given(stage)
        for name, scale in given.items():
            if scale is not None:
                _give(changed.graph, name + OUT)
        del changed.graph.value_info[:]  # it speaks of types from before
        held |= given
        found.append(StageModel(stage.exit, changed))
    return found


def _dequantised(graph: Any, name: str) -> Any:
    """The node that turns eight bits into a tensor, or ``None``."""
    maker = next((node for node in graph.node if name in node.output), None)
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _scale(graph: Any, node: Any) -> Scale:
    """Of a node that quantises or turns back."""
    to_array = require("onnx.numpy_helper", extra="onnx").to_array
    weights = {weight.name: weight for weight in graph.initializer}
    scale, zero_point = (to_array(weights[name]).item() for name in node.input[1:3])
    return Scale(np.float32(scale), np.uint8(zero_point))


def _give(graph: Any, name: str) -> None:
    """Make an output that is turned back eight bits."""
    maker = _dequantised(graph, name)
    bits = maker.input[0]
    if _rename_uses(graph, name, f"{name}/float"):
        maker.output[0] = f"{name}/float"
    else:
        graph.node.remove(maker)
    value = next(value for value in graph.output if value.name == name)
    graph.node.append(_turned(bits, name, CHANNELS_LAST, value))
    _set_bits(value)


def _take(graph: Any, name: str, scale: Scale) -> None:
    """Make an input eight bits, where there is that input."""
    value = next((value for value in graph.input if value.name == name), None)
    if value is None:
        return
    helper, numpy_helper = require("onnx.helper", extra="onnx"), require("onnx.numpy_helper", extra="onnx")
    front, bits = [_turned(name, f"{name}/bits", CHANNELS_FIRST, value)], f"{name}/bits"
    for node in list(graph.node):
        if node.op_type == "QuantizeLinear" and node.input[0] == name and _scale(graph, node) == scale:
            graph.node.remove(node)
            _rename_uses(graph, node.output[0], bits)
    if _rename_uses(graph, name, f"{name}/float"):
        numbers = [f"{name}/scale", f"{name}/zero_point"]
        for number, one in zip(numbers, scale, strict=True):
            graph.initializer.append(numpy_helper.from_array(np.asarray(one), number))
        front.append(
            helper.make_node("DequantizeLinear", [bits, *numbers], [f"{name}/float"], name=f"{name}/dequantised")
        )
    for place, node in enumerate(front):
        graph.node.insert(place, node)
    _set_bits(value)


def _turned(source: str, target: str, order: Sequence[int], value: Any) -> Any:
    """A node that makes a feature map's channels come last, or first; another tensor stays as it is."""
    make_node = require("onnx.helper", extra="onnx").make_node
    if len(value.type.tensor_type.shape.dim) != len(order):
        return make_node("Identity", [source], [target], name=target)
    return make_node("Transpose", [source], [target], name=target, perm=list(order))


def _set_bits(value: Any) -> None:
    """An input or output as it is handed over."""
    kind = value.type.tensor_type
    kind.elem_type = require("onnx", extra="onnx").TensorProto.UINT8
    if len(kind.shape.dim) == len(CHANNELS_LAST):
        dims = [copy.deepcopy(kind.shape.dim[axis]) for axis in CHANNELS_LAST]
        del kind.shape.dim[:]
        kind.shape.dim.extend(dims)


def _rename_uses(graph: Any, old: str, new: str) -> bool:
    """Let the nodes that read a tensor read another; whether there are any."""
    uses = [(node, place) for node in graph.node for place, name in enumerate(node.input) if name == old]
    for node, place in uses:
        node.input[place] = new
    return bool(uses)
