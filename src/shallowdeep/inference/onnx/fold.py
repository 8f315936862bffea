"""Stage files folded into one ONNX file that leaves by itself: each exit is an ``If`` around all that is deeper.

Two kinds: for one sample the branch asks whether it stops; for a batch whether any row goes on, the rows that do
are gathered, run deeper, and their answers scattered back over those of the exits before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shallowdeep.errors import NetworkError, require
from shallowdeep.inference.runner.stages import OUT

PLAN = "shallowdeep/plan"  # no input of a network is called so
NESTING = 24  # an If costs protobuf three levels of messages, and its readers refuse a hundred


@dataclass(frozen=True)
class StageModel:
    """One stage as an ONNX model.

    Attributes:
        exit: index of the exit it ends at.
        model: an ``onnx.ModelProto``; its outputs are the values for later stages, ``stop``, ``scores``, ``logits``.
    """

    exit: int
    model: Any

    @property
    def inputs(self) -> list[str]:
        """Names of what it takes, thresholds among them."""
        return [value.name for value in self.model.graph.input]

    @property
    def outputs(self) -> list[str]:
        """Names of what it gives."""
        return [value.name for value in self.model.graph.output]


@dataclass
class _Part:
    """What a graph is built of; the weights stay in the branch that uses them."""

    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node of one output."""
        helper = require("onnx.helper", extra="onnx")
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant."""
        self.weights.append(require("onnx.numpy_helper", extra="onnx").from_array(value, name))
        return name


@dataclass(frozen=True)
class _Fold:
    stages: Sequence[StageModel]
    thresholds: Sequence[str]
    batched: bool
    planned: bool = False

    def deeper(self, place: int, values: Mapping[str, str]) -> tuple[_Part, str, str]:
        """A stage and all behind it, as a graph's parts; the names of its scores and its exits."""
        stage, prefix = self.stages[place], f"stage_{place}/"
        part = _Part()
        found = _inline(stage.model.graph, prefix, values, part)
        here = part.constant(f"{prefix}exit", np.array([stage.exit], dtype=np.int64))
        rows = part.add("Shape", [found["stop"]], f"{prefix}rows")
        exits = part.add("Expand", [here, rows], f"{prefix}exits")
        if place == len(self.stages) - 1:
            return part, found["scores"], exits
        if self.planned:  # the policy is asked all the same: what is timed is what a policy takes
            leaves = part.add("LessOrEqual", [values[PLAN], here], f"{prefix}planned")
            both = part.add("And", [found["stop"], leaves], f"{prefix}asked")
            found["stop"] = part.add("Or", [leaves, both], f"{prefix}stop_by_plan")
        known = {**values, **{name.removesuffix(OUT): held for name, held in found.items() if name.endswith(OUT)}}
        branch = self._survivors if self.batched else self._alone
        return part, *branch(place, part, prefix, known, found, exits)

    def _alone(
        self, place: int, part: _Part, prefix: str, known: dict[str, str], found: Mapping[str, str], exits: str
    ) -> tuple[str, str]:
        part.add("Squeeze", [found["stop"]], f"{prefix}leaves")
        then = _branch(f"{prefix}leave", _Part(), found["scores"], exits)
        otherwise = _branch(f"{prefix}stay", *self.deeper(place + 1, known))
        return _if(part, prefix, f"{prefix}leaves", then, otherwise)

    def _survivors(
        self, place: int, part: _Part, prefix: str, known: dict[str, str], found: Mapping[str, str], exits: str
    ) -> tuple[str, str]:
        stays = part.add("Not", [found["stop"]], f"{prefix}stays")
        minus_one = part.constant(f"{prefix}flat", np.array([-1], dtype=np.int64))
        at = part.add("NonZero", [stays], f"{prefix}at")
        index = part.add("Reshape", [at, minus_one], f"{prefix}index")
        none = part.constant(f"{prefix}zero", np.array(0, dtype=np.int64))
        count = part.add("Size", [index], f"{prefix}count")
        part.add("Equal", [count, none], f"{prefix}empty")
        then = _branch(f"{prefix}leave", _Part(), found["scores"], exits)
        inner = _Part()
        wanted = {PLAN, *(name for later in self.stages[place + 1 :] for name in later.inputs)}
        rows = {
            name: inner.add("Gather", [held, index], f"{prefix}kept/{name}", axis=0)
            for name, held in known.items()
            if name in wanted and name not in self.thresholds
        }
        deep, scores, left = self.deeper(place + 1, {**known, **rows})
        inner.nodes += deep.nodes
        inner.weights += deep.weights
        one = inner.constant(f"{prefix}one", np.array([1], dtype=np.int64))
        places = inner.add("Unsqueeze", [index, one], f"{prefix}places")
        merged = inner.add("ScatterND", [found["scores"], places, scores], f"{prefix}merged_scores")
        merged_exits = inner.add("ScatterND", [exits, places, left], f"{prefix}merged_exits")
        return _if(part, prefix, f"{prefix}empty", then, _branch(f"{prefix}stay", inner, merged, merged_exits))


def check_nesting(num_exits: int) -> None:
    """Whether so many exits fit into one file, each inside the branch of the one before.

    Raises:
        NetworkError: they are too many.
    """
    if num_exits > NESTING:
        raise NetworkError(
            f"{num_exits} exits do not nest in one file, at most {NESTING} do. Let the policy look at fewer (its "
            "exits=), or write the stages alone: export(…, single=False, batched=False), --stages-only."
        )


def fold(stages: Sequence[StageModel], thresholds: Sequence[str], *, batched: bool, planned: bool = False) -> Any:
    """One model of all stages.

    - inputs: the network's, then the thresholds
    - outputs: ``scores`` ``(rows, outputs)`` and ``exit`` ``(rows,)``

    Args:
        stages: shallow to deep.
        thresholds: names of the policy's numbers.
        batched: for any number of rows, else for one.
        planned: another input, ``PLAN`` ``(rows,)``, says at which exit each row leaves, whatever the policy says.

    Raises:
        NetworkError: the stages differ in opset, or are too many.
    """
    helper = require("onnx.helper", extra="onnx")
    check_nesting(len(stages))
    opsets = _opsets(stages)
    rows = "batch" if batched else 1
    inputs = _inputs(stages, batched)
    if planned:
        inputs.append(helper.make_tensor_value_info(PLAN, _int(), [rows]))
    known = {value.name: value.name for value in inputs}
    part, scores, exits = _Fold(stages, thresholds, batched, planned).deeper(0, known)
    part.add("Identity", [scores], "scores")
    part.add("Identity", [exits], "exit")
    first = stages[0].model
    outputs = next(value for value in first.graph.output if value.name == "scores").type.tensor_type.shape.dim[1]
    graph = helper.make_graph(
        part.nodes,
        "self_exiting",
        inputs,
        [
            helper.make_tensor_value_info("scores", _float(), [rows, outputs.dim_value]),
            helper.make_tensor_value_info("exit", _int(), [rows]),
        ],
        initializer=part.weights,
    )
    model = helper.make_model(graph, opset_imports=opsets, producer_name="shallowdeep")
    model.ir_version = max(stage.model.ir_version for stage in stages)
    return model


def _float() -> int:
    return require("onnx", extra="onnx").TensorProto.FLOAT


def _int() -> int:
    return require("onnx", extra="onnx").TensorProto.INT64


def _opsets(stages: Sequence[StageModel]) -> list[Any]:
    versions: dict[str, Any] = {}
    for stage in stages:
        for entry in stage.model.opset_import:
            known = versions.setdefault(entry.domain, entry)
            if known.version != entry.version:
                raise NetworkError(
                    f"stages differ in opset ({known.version} and {entry.version}) and do not fold into one file. "
                    "Write the stages alone: export(…, single=False, batched=False), --stages-only."
                )
    return list(versions.values())


def _inputs(stages: Sequence[StageModel], batched: bool) -> list[Any]:
    """What all stages take from outside, each once."""
    onnx = require("onnx", extra="onnx")
    made = {name.removesuffix(OUT) for stage in stages for name in stage.outputs if name.endswith(OUT)}
    found: dict[str, Any] = {}
    for stage in stages:
        for value in stage.model.graph.input:
            if value.name in made or value.name in found:
                continue
            copied = onnx.ValueInfoProto()
            copied.CopyFrom(value)
            dims = copied.type.tensor_type.shape.dim
            if len(dims):  # a threshold has none
                dims[0].Clear()
                if batched:
                    dims[0].dim_param = "batch"
                else:
                    dims[0].dim_value = 1
            found[value.name] = copied
    return list(found.values())


def _inline(graph: Any, prefix: str, values: Mapping[str, str], part: _Part) -> dict[str, str]:
    """Add a graph's nodes and weights to a part, every name made unique; what its outputs are called there."""
    names = {value.name: values[value.name] for value in graph.input}
    for weight in graph.initializer:
        copied = type(weight)()
        copied.CopyFrom(weight)
        copied.name = names[weight.name] = prefix + weight.name
        part.weights.append(copied)
    part.nodes += [_copied(node, prefix, names) for node in graph.node]
    return {value.name: names[value.name] for value in graph.output}


def _copied(node: Any, prefix: str, names: dict[str, str]) -> Any:
    copied = type(node)()
    copied.CopyFrom(node)
    copied.name = prefix + node.name
    del copied.input[:], copied.output[:]
    copied.input.extend(names.get(name, name) for name in node.input)
    names.update({name: prefix + name for name in node.output if name})
    copied.output.extend(names.get(name, name) for name in node.output)
    for attribute in copied.attribute:  # a network may have branches of its own
        for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            _rename_inner(inner, prefix, dict(names))
    return copied


def _rename_inner(graph: Any, prefix: str, names: dict[str, str]) -> None:
    for value in [*graph.input, *graph.initializer]:
        names[value.name] = value.name = prefix + value.name
    nodes = [_copied(node, prefix, names) for node in graph.node]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for value in graph.output:
        value.name = names[value.name]


def _branch(name: str, part: _Part, scores: str, exits: str) -> Any:
    """A branch's graph; it may not give out what was made outside it, so both go through an ``Identity``."""
    helper = require("onnx.helper", extra="onnx")
    given = [part.add("Identity", [held], f"{name}/{kind}") for held, kind in ((scores, "scores"), (exits, "exit"))]
    kinds = (_float(), _int())
    outputs = [helper.make_tensor_value_info(held, kind, None) for held, kind in zip(given, kinds, strict=True)]
    return helper.make_graph(part.nodes, name, [], outputs, initializer=part.weights)


def _if(part: _Part, prefix: str, condition: str, then: Any, otherwise: Any) -> tuple[str, str]:
    helper = require("onnx.helper", extra="onnx")
    given = [f"{prefix}scores_out", f"{prefix}exit_out"]
    part.nodes.append(
        helper.make_node("If", [condition], given, name=f"{prefix}if", then_branch=then, else_branch=otherwise)
    )
    return given[0], given[1]
