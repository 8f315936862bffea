"""Stages in int8: activations in 8 bits without sign, weights in 8 bits per channel, the policy in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.errors import NetworkError, require
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.onnx.fold import StageModel
from shallowdeep.inference.onnx.handover import Scale, scales_given
from shallowdeep.inference.runner.sessions import RunnerError, Settings
from shallowdeep.inference.runner.stages import OUT, OnnxStages
from shallowdeep.networks.calls import first_line

MIN_ROWS = 64  # that a stage is calibrated on, if need be with samples that would have left before it
ROWS = 32  # run at a time
HEAVY = ("Conv", "Gemm", "MatMul")
BETWEEN = ("Relu", "MaxPool", "GlobalAveragePool")  # what keeps convolutions' values in int8 on their way


def quantize_stages(
    models: Sequence[StageModel],
    thresholds: Mapping[str, float | int],
    inputs: Values,
    *,
    threads: int = 1,
    weight_bits: int = 7,
) -> list[StageModel]:
    """Stages in int8, each calibrated on the features of samples that reach it under the policy.

    Where a stage gives out what it has in eight bits, the next one reads it on the same scale (see ``handover``).

    Args:
        models: in float32, shallow to deep.
        thresholds: the policy's numbers.
        inputs: of the first stage, real ones; some hundred rows.
        threads: to run the float stages with.
        weight_bits: 7 or 8. In 8 bits sums of products saturate on processors without VNNI (AVX2), which changes
            answers far more than the bit that is lost.

    Raises:
        NetworkError: a stage cannot be quantised.
    """
    reaching = _reaching(models, thresholds, inputs, threads)
    found: list[StageModel] = []
    known: dict[str, Scale | None] = {}
    for place, (model, feeds) in enumerate(zip(models, reaching, strict=True)):
        found.append(_quantized(model, feeds, place, weight_bits, known))
        known |= scales_given(found[-1])
    return found


def _reaching(
    models: Sequence[StageModel], thresholds: Mapping[str, float | int], inputs: Values, threads: int
) -> list[list[Values]]:
    """What each stage is run on, as batches, when samples leave where the policy says so."""
    files = [model.model.SerializeToString() for model in models]
    try:
        stages = OnnxStages(files, [model.exit for model in models], thresholds, Settings(threads=threads))
    except RunnerError as error:
        raise NetworkError(f"the stages cannot be run to be calibrated: {error}") from error
    numbers = {name: stages._thresholds[name] for name in thresholds}
    found: list[list[Values]] = []
    values = inputs
    for place, model in enumerate(models):
        wanted = [name for name in model.inputs if name not in numbers]
        steps, fed = [], []
        for part in _batches(values):
            fed.append({**{name: part[name] for name in wanted}, **numbers})
            steps.append(stages.run(place, part))
        found.append(fed)
        if place < len(models) - 1:
            stop = np.concatenate([step.stop for step in steps])
            staying = np.flatnonzero(~stop)
            if len(staying) < MIN_ROWS:  # the surest of those that leave are the least like those that come
                staying = _filled(staying, stop, np.concatenate([step.scores for step in steps]))
            values = stages.take(stages.join([step.values for step in steps]), staying)
    return found


def _filled(staying: np.ndarray, stop: np.ndarray, scores: np.ndarray) -> np.ndarray:
    leaving = np.flatnonzero(stop)
    order = leaving[np.argsort(scores[leaving].max(-1), kind="stable")]
    return np.sort(np.concatenate([staying, order[: MIN_ROWS - len(staying)]]))


def _batches(values: Values) -> Iterator[Values]:
    rows = len(next(iter(values.values())))
    for first in range(0, rows, ROWS):
        yield {name: value[first : first + ROWS] for name, value in values.items()}


def _quantized(
    model: StageModel, feeds: list[Values], place: int, weight_bits: int, known: Mapping[str, Scale | None]
) -> StageModel:
    """A stage in int8, on the scales that are known of its inputs."""
    onnx = require("onnx", extra="onnx")
    tools = require("onnxruntime.quantization", extra="onnx")
    prepare = require("onnxruntime.quantization.shape_inference", extra="onnx").quant_pre_process
    with tempfile.TemporaryDirectory(prefix="shallowdeep-") as folder:
        plain, prepared, written = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "int8"))
        try:
            onnx.save(model.model, plain)
            # The symbolic shapes fail on a policy that keeps its best answer, and change nothing for the others.
            prepare(plain, prepared, skip_symbolic_shape=True)
            names = body_nodes(onnx.load(prepared).graph)
            if not names:
                return model
            tools.quantize_static(
                prepared,
                written,
                _reader(tools.CalibrationDataReader, feeds),
                quant_format=tools.QuantFormat.QDQ,
                op_types_to_quantize=[*HEAVY, "Add", *BETWEEN],
                nodes_to_quantize=names,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                per_channel=True,
                reduce_range=weight_bits == 7,
                extra_options={
                    # logits in 256 steps would make confidences tie
                    "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                    "TensorQuantOverrides": {
                        name: [{"scale": np.asarray(one.scale), "zero_point": np.asarray(one.zero_point)}]
                        for name, one in known.items()
                        if one is not None and name in model.inputs
                    },
                },
            )
            found = onnx.load(written)
        except Exception as error:  # whatever the tool makes of a graph it does not know
            raise NetworkError(
                f"stage {place} (exit {model.exit}) cannot be quantised: {first_line(error)}. Use precision='fp32'."
            ) from error
    _check_names(model, StageModel(model.exit, found))
    return StageModel(model.exit, found)


def _check_names(before: StageModel, after: StageModel) -> None:
    if before.inputs != after.inputs or before.outputs != after.outputs:
        raise NetworkError(
            f"quantising changed what the stage up to exit {before.exit} takes or gives: {after.inputs}, "
            f"{after.outputs}. Use precision='fp32'."
        )


def body_nodes(graph: Any) -> list[str]:
    """Names of a stage's nodes to be quantised: of the network's, never of the policy's.

    The network's are those that features or logits are made of. An ``Add`` is taken where it follows a convolution
    (a residual), and what lies behind convolutions alone.
    """
    makers = {name: node for node in graph.node for name in node.output}
    body, wanted = {}, [value.name for value in graph.output if value.name in ("logits", "features" + OUT)]
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.name not in body:
            body[node.name] = node
            wanted += node.input
    weights = {weight.name for weight in graph.initializer}
    convolved: set[str] = set()
    chosen = []
    for node in graph.node:  # in the order of the flow
        if node.name not in body:
            continue
        residual = node.op_type == "Add" and not weights & set(node.input) and convolved & set(node.input)
        between = node.op_type in BETWEEN and node.input[0] in convolved
        if node.op_type == "Conv" or residual or between:
            convolved.update(node.output)
        if node.op_type in HEAVY or residual or between:
            chosen.append(node.name)
    return chosen


def _reader(kind: type, feeds: list[Values]) -> Any:
    class Reader(kind):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Values | None:
            return next(self.left, None)

    return Reader()
