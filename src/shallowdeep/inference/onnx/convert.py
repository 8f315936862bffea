"""A network's stages as ONNX models, the policy's step inside each."""

from __future__ import annotations

import copy
import dataclasses
import logging
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shallowdeep.errors import NetworkError, require
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.onnx.fold import StageModel
from shallowdeep.inference.onnx.pixels import Pixels
from shallowdeep.inference.runner.stages import OUT
from shallowdeep.inference.stages import EXPORT_ROWS, Stage, as_values, cut, thresholds_of
from shallowdeep.networks.calls import distinct_rows, first_line
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy, exits_of
from shallowdeep.quiet import quiet

OPSET = 20


@dataclass(frozen=True)
class Converted:
    """A network as ONNX stages, beside what they were made of.

    Attributes:
        models: shallow to deep.
        modules: the same stages in PyTorch.
        examples: inputs of the network by name, on the CPU, a few rows that differ.
        pixels: of the normalisation inside.
        sdn: the network, on the CPU in float32.
        like: inputs built as it takes them.
    """

    models: list[StageModel]
    modules: list[Stage]
    examples: dict[str, Tensor]
    pixels: Pixels | None
    sdn: ShallowDeepNetwork
    like: Any

    @property
    def inputs(self) -> Values:
        """The examples as the exported stages take them."""
        return {name: value.numpy() for name, value in self.as_exported(self.examples).items()}

    @property
    def reference(self) -> dict[str, Tensor]:
        """The same examples as the network takes them."""
        found = self.as_exported(self.examples)
        pixels = self.pixels
        return found if pixels is None else {**found, pixels.name: pixels.normalise(found[pixels.name])}

    def as_exported(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the network as the exported stages take them: as uint8, where they normalise images."""
        pixels = self.pixels
        return dict(values) if pixels is None else {**values, pixels.name: pixels.pixels(values[pixels.name])}


def convert(
    sdn: ShallowDeepNetwork,
    policy: ExitPolicy,
    example_inputs: Any,
    *,
    pixels: Pixels | None = None,
    opset: int = OPSET,
) -> Converted:
    """Cut a network into stages with a policy inside, as ONNX models.

    Args:
        sdn: not changed, on any device, of any precision: the copy is float32.
        policy: with its numbers typed (``as_typed``).
        example_inputs: what the network takes, any batch size.
        pixels: where the first stage shall take uint8 images.
        opset: of ONNX operators.

    Raises:
        NetworkError: names the stage that cannot be exported.
        MissingExtra: onnx or onnxscript is not installed.
    """
    for module in ("onnx", "onnxscript"):
        require(module, extra="onnx")
    like = next(sdn.parameters())
    if like.device.type != "cpu" or like.dtype != torch.float32:
        sdn = copy.deepcopy(sdn).to("cpu", torch.float32)
        example_inputs = pytree.tree_map_only(Tensor, lambda t: t.cpu(), example_inputs)
    bodies = cut(sdn, example_inputs, exits=exits_of(policy, sdn.num_exits))
    modules = [Stage(body, policy, sdn.num_outputs, is_first=place == 0).eval() for place, body in enumerate(bodies)]
    examples = as_values(distinct_rows(example_inputs, max(2 * EXPORT_ROWS, 8)))
    converted = Converted([], modules, examples, pixels, sdn, example_inputs)
    values = converted.as_exported(examples)
    numbers = {name: torch.tensor(number) for name, number in thresholds_of(policy).items()}
    with torch.no_grad():
        for body, module in zip(bodies, modules, strict=True):
            graph = _Graph(module, pixels).eval()
            args = tuple({**values, **numbers}[name] for name in (*module.inputs, *module.thresholds))
            where = "the last exit" if body.is_last else f"exit {body.exit} ({sdn.taps[body.exit]})"
            converted.models.append(_convert(graph, args, where, opset))
            values.update(zip(module.outputs, graph(*args), strict=False))
    return converted


class _Graph(nn.Module):
    """A stage as it is exported: pixels are normalised before it."""

    def __init__(self, stage: Stage, pixels: Pixels | None):
        super().__init__()
        self.stage, self.pixels = stage, pixels

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        names = (*self.stage.inputs, *self.stage.thresholds)
        pixels = self.pixels
        return self.stage(
            *(
                pixels.normalise(value) if pixels is not None and name == pixels.name else value
                for name, value in zip(names, values, strict=True)
            )
        )


def _convert(graph: _Graph, args: tuple[Tensor, ...], where: str, opset: int) -> StageModel:
    stage = graph.stage
    batch = torch.export.Dim("batch", min=1, max=2**20)
    shapes = tuple({0: batch} if value.ndim else {} for value in args)
    try:
        # of an opset that cannot be had they write what they tried; it is said in words below
        with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript", below=logging.CRITICAL):
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # the exporter's own copying
            warnings.filterwarnings("ignore", ".*axis name: batch will not be used.*", UserWarning)
            program = torch.onnx.export(
                graph,
                args,
                dynamo=True,
                input_names=[*stage.inputs, *stage.thresholds],
                output_names=[*(name + OUT for name in stage.outputs), "stop", "scores", "logits"],
                dynamic_shapes=(shapes,),
                opset_version=opset,
                verbose=False,
            )
            model = program.model_proto  # type: ignore[union-attr]
            model = _bare(require("onnx.inliner", extra="onnx").inline_local_functions(model))
    except Exception as error:  # whatever the network's own code, or an operator without a translation, makes of it
        why = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise NetworkError(
            f"the stage up to {where} has no ONNX form: {first_line(why)}. "
            "Engine(…, backend='eager') or 'compiled' runs the network as it is."
        ) from error
    (found,) = (entry.version for entry in model.opset_import if entry.domain == "")
    if found != opset:
        raise NetworkError(
            f"the stage up to {where} cannot be written in opset {opset}. Use opset={OPSET} (--opset), the default."
        )
    return StageModel(stage.exit, model)


def _bare(model: Any) -> Any:
    """A model without the notes of where on this machine each node came from."""
    del model.metadata_props[:]
    _strip(model.graph)
    return model


def _strip(graph: Any) -> None:
    del graph.metadata_props[:], graph.value_info[:]
    for part in [*graph.node, *graph.input, *graph.output, *graph.initializer]:
        del part.metadata_props[:]
        part.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _strip(inner)


def as_typed(policy: ExitPolicy) -> ExitPolicy:
    """The policy with whole numbers made real ones where its fields say so: a graph's input has one type."""
    numbers = thresholds_of(policy)
    if not numbers:
        return policy
    hints = typing.get_type_hints(type(policy))
    real = {name for name in numbers if hints.get(name) is float or float in typing.get_args(hints.get(name))}
    return dataclasses.replace(policy, **{name: float(numbers[name]) for name in real})  # type: ignore[type-var]
