"""Feature maps in ONNX Runtime's blocked layout, also where a stage begins beside a convolution.

On CPUs ONNX Runtime computes convolutions on blocks of channels (NCHWc), and adds a residual to them in the same go. A
tensor comes into that layout where a convolution or a pooling reads it. Features that go past a stage's first
convolution, as those of an identity shortcut do, stay out of it: their sum is computed apart in the plain layout, is
the next block's shortcut, and so on to the end of the stage. A pooling of one pixel puts them into blocks once.
"""

from __future__ import annotations

import copy
from typing import Any

from shallowdeep.errors import require
from shallowdeep.inference.onnx.fold import StageModel
from shallowdeep.inference.stages import FEATURES

BLOCKED = f"{FEATURES}_blocked"
BLOCKING = {
    "Conv",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
}  # operators that bring a tensor into blocks themselves


def kept_blocked(model: StageModel) -> StageModel:
    """A stage that reads its feature map through a pooling of one pixel, where that lets its sums be blocked.

    Args:
        model: not changed.

    Returns:
        A copy with the pooling in front, or the stage itself where it has no feature map ``(n, c, h, w)``, no
        convolution, or reads the map by convolutions and poolings alone.
    """
    graph = model.model.graph
    entering = [value for value in graph.input if value.name == FEATURES]
    readers = {node.op_type for node in graph.node if FEATURES in node.input}
    convolves = any(node.op_type == "Conv" for node in graph.node)
    if not convolves or not readers - BLOCKING or len(entering[0].type.tensor_type.shape.dim) != 4:
        return model
    changed = copy.deepcopy(model.model)
    for node in changed.graph.node:
        for place, name in enumerate(node.input):
            if name == FEATURES:
                node.input[place] = BLOCKED
    changed.graph.node.insert(0, _one_pixel())
    return StageModel(model.exit, changed)


def _one_pixel() -> Any:
    make_node = require("onnx.helper", extra="onnx").make_node
    return make_node("MaxPool", [FEATURES], [BLOCKED], name=BLOCKED, kernel_shape=[1, 1])
