"""A network cut at its exits: stages that run one after another, each with the policy's step inside.

Each stage is exported by running the whole backbone with the previous tap's output replaced by an input: what
lies before it becomes dead code and is taken out, and so is what lies behind the stage's own tap. A legal site
is one that all later work goes through, so nothing else is cut off; what a stage still wants of the network's
inputs (an attention mask) is carried along beside the features, and a stage that would repeat work is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.nn.utils.fusion import fuse_conv_bn_weights

from shallowdeep.data.pytrees import map_tensors
from shallowdeep.errors import DataError, NetworkError
from shallowdeep.networks.calls import distinct_rows, evaluating, first_line, plain_inputs, without_autocast
from shallowdeep.networks.costs import flop_counter
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import replaced, tapped
from shallowdeep.policies.rules import ExitPolicy

FEATURES = "features"
EAGER = "Engine(…, backend='eager') runs any attached network."
EXPORT_ROWS = 4  # rows of the example while exporting: PyTorch takes one row for a constant


@dataclass(frozen=True)
class Body:
    """One stage's part of the network, without a policy.

    Attributes:
        exit: index of the exit it ends at.
        graph: called with the values named in ``inputs``, in that order; gives ``(features, logits)``, at the
            last exit ``(logits,)``.
        inputs: names of the values it wants: ``"features"``, the previous stage's, and inputs of the network.
    """

    exit: int
    graph: fx.GraphModule
    inputs: tuple[str, ...]

    @property
    def is_last(self) -> bool:
        """Whether it gives no features for a stage behind it."""
        return len(next(node for node in self.graph.graph.nodes if node.op == "output").args[0]) == 1


class Stage(nn.Module):
    """A body and the policy's step behind it, as one module.

    - inputs: the values named in ``inputs``, then the thresholds named in ``thresholds`` (scalar tensors), by position
    - output: the values named in ``outputs``, then ``stop``, ``scores`` and ``logits``

    Attributes:
        exit: index of the exit it ends at.
        is_last: nothing comes behind it.
        inputs: names of values: the body's, then the policy's state ``"state_0"``, ….
        outputs: names of the values it gives to later stages: ``"features"`` and the state.
        thresholds: names of the policy's numbers.
    """

    def __init__(
        self,
        body: Body,
        policy: ExitPolicy,
        num_outputs: int,
        *,
        is_first: bool,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        state = [f"state_{place}" for place in range(len(policy.start(1, num_outputs)))]
        self.body = copy.deepcopy(body.graph).to(dtype)  # a body's weights may be the network's own
        self.exit, self.is_first, self.is_last = body.exit, is_first, body.is_last
        self.inputs = (*body.inputs, *([] if is_first else state))
        self.outputs = () if self.is_last else (FEATURES, *state)
        self.thresholds = tuple(thresholds_of(policy))
        self._policy, self._num_outputs, self._num_inputs, self._dtype = policy, num_outputs, len(body.inputs), dtype

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the stage."""
        inputs, rest = values[: self._num_inputs], values[self._num_inputs :]
        found = self.body(*(x.to(self._dtype) if x.is_floating_point() else x for x in inputs))
        logits = found[-1].float()
        split = len(rest) - len(self.thresholds)
        policy = with_thresholds(self._policy, dict(zip(self.thresholds, rest[split:], strict=True)))
        state = rest[:split]
        if self.is_first:
            state = tuple(s.to(logits.device) for s in policy.start(logits.shape[0], self._num_outputs))
        verdict = policy.step(state, logits, self.exit)
        going_on = () if self.is_last else (found[0], *verdict.state)
        return (*going_on, verdict.stop, verdict.scores, logits)


def thresholds_of(policy: ExitPolicy) -> dict[str, float | int]:
    """A policy's numbers by name: what goes into a stage from outside, so that it can be changed there."""
    if not dataclasses.is_dataclass(policy):
        return {}
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {
        name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def with_thresholds(policy: ExitPolicy, numbers: Mapping[str, Tensor]) -> ExitPolicy:
    """The same policy with tensors in the place of its numbers."""
    return dataclasses.replace(policy, **numbers) if numbers else policy  # type: ignore[type-var]


def as_values(inputs: Any) -> dict[str, Tensor]:
    """A network's inputs by name: ``"inputs"``; of several ``"input_0"``, …, or their own names."""
    if isinstance(inputs, Tensor):
        return {"inputs": inputs}
    if isinstance(inputs, np.ndarray):
        raise NetworkError("the network takes tensors, got an array of numpy: pass torch.from_numpy(inputs).")
    inputs = plain_inputs(inputs)
    if isinstance(inputs, Mapping):  # a keyword that is None is as good as not given
        inputs = {name: value for name, value in inputs.items() if value is not None}
    pairs = inputs.items() if isinstance(inputs, Mapping) else ((f"input_{i}", t) for i, t in enumerate(inputs))
    values = dict(pairs)
    wrong = [name for name, value in values.items() if not isinstance(value, Tensor)]
    if wrong:
        raise NetworkError(f"a network in stages takes tensors only; {', '.join(wrong)} is none.")
    return values


def as_inputs(values: Mapping[str, Tensor], like: Any) -> Any:
    """The other way round: values as a network takes them, built like some of its inputs."""
    if isinstance(like, Tensor):
        return values["inputs"]
    return dict(values) if isinstance(like, Mapping) else tuple(values.values())


def check_values(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """A batch by name is one for a network that takes inputs like some examples.

    Raises:
        DataError: names, shapes, types or numbers of rows differ, there is no row, or a number is not finite.
    """
    if values.keys() != expected.keys():
        raise DataError(f"the network takes {', '.join(expected)}; got {', '.join(values)}.")
    for name, tensor in values.items():
        _check_value(name, tensor, expected[name])
    if len({len(tensor) for tensor in values.values()}) > 1:
        raise DataError(f"inputs differ in rows: { ({name: len(t) for name, t in values.items()}) }.")


def _check_value(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape[1:] != expected.shape[1:] or tensor.dtype != expected.dtype:
        raise DataError(
            f"{name} must be of shape (n, {', '.join(map(str, expected.shape[1:]))}) and {expected.dtype}, "
            f"got {tuple(tensor.shape)} and {tensor.dtype}."
        )
    if len(tensor) == 0:
        raise DataError(f"{name} holds no sample: a batch has at least one.")
    if tensor.is_floating_point() and not _is_finite(tensor):
        rows = np.flatnonzero(~tensor.isfinite().flatten(1).all(1).cpu().numpy())
        raise DataError(f"{name} holds numbers that are not finite, first in row {rows[0]} ({len(rows)} rows in all).")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
        # a quarter of PyTorch's time on an image of 32 pixels
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(tensor.isfinite().all())


def check_label_sets(sdn: ShallowDeepNetwork) -> None:
    """Refuse a network whose exits answer in several label sets: a softmax over all columns means nothing.

    Raises:
        NetworkError: it has several.
    """
    if len(sdn.label_spaces) > 1:
        raise NetworkError(
            f"this network answers in the label sets {', '.join(sdn.label_spaces)}; a policy looks at one softmax. "
            "Run it by itself, sdn(inputs), or attach exits for one label set."
        )


def cut(
    sdn: ShallowDeepNetwork, example_inputs: Any, *, exits: Sequence[int] | None = None, fold: bool = True
) -> list[Body]:
    """Cut a network behind some of its exits.

    Args:
        sdn: left as it was; the stages share its weights until they are folded or converted.
        example_inputs: any batch size; says the shapes and types, not the size of a batch.
        exits: where to cut, the last exit among them; ``None``: at all.
        fold: put batch-norm into the convolution before it.

    Returns:
        The stages' bodies, shallow to deep, for any batch size.

    Raises:
        NetworkError: ``torch.export`` does not take the network, or a stage would repeat work of an earlier one.
    """
    exits = list(range(sdn.num_exits)) if exits is None else list(exits)
    device = next(sdn.parameters()).device
    inputs = map_tensors(lambda t: t.to(device), distinct_rows(example_inputs, EXPORT_ROWS))
    taken = [name for name in as_values(inputs) if name == FEATURES or name.startswith("state_")]
    if taken:
        raise NetworkError(f"stages have inputs of their own named {', '.join(taken)}. {EAGER}")
    bodies = []
    with evaluating(sdn), without_autocast():
        features: Tensor | None = None
        for place, exit in enumerate(exits):
            values = as_values(inputs)
            before = exits[place - 1] if place else None
            graph = _export(_Part(sdn, before, exit, inputs), features, values)
            names = ([] if features is None else [FEATURES]) + list(values)
            body = Body(exit, *_trimmed(graph, names))
            _check_work(sdn, body, before, _where(sdn, exit), {FEATURES: features, **values}, rows=EXPORT_ROWS)
            if fold:
                fold_batch_norms(body.graph)
            bodies.append(body)
            if exit != exits[-1]:
                known = {FEATURES: features, **values}
                features = body.graph(*(known[name] for name in body.inputs))[0]
    return bodies


class _Part(nn.Module):
    """The whole network, entered behind one exit's tap and left at another's."""

    def __init__(self, sdn: ShallowDeepNetwork, before: int | None, exit: int, like: Any):
        super().__init__()
        self.sdn = sdn
        self.entry = None if before is None else sdn.taps[before]
        self.exit = exit
        self.is_last = exit == sdn.num_exits - 1
        self._like = like

    def forward(self, features: Tensor | None, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        backbone = self.sdn.backbone
        left = [] if self.is_last else [self.sdn.taps[self.exit]]
        # An exception would leave earlier, but the exporter counts on modules that are left as they were entered.
        with replaced(backbone, self.entry, features), tapped(backbone, left) as found:
            logits = self.sdn.run_backbone(as_inputs(values, self._like))
        if self.is_last:
            return (logits,)
        (tap,) = found.values()
        return tap, self.sdn.exits[self.exit](tap)


def _export(part: _Part, features: Tensor | None, values: dict[str, Tensor]) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=2**20)
    shapes = (None if features is None else {0: batch}, {name: {0: batch} for name in values})
    try:
        with warnings.catch_warnings():  # the exporter copies what it says itself is out of date
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            exported = torch.export.export(part, (features, values), dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions({}).module()  # nothing is decomposed; nothing works in place any more
    except Exception as error:  # whatever the network's own code makes of being traced
        raise NetworkError(
            f"{_running(part.sdn, error)} cannot be exported: {first_line(error)}. It was met on the way to the stage "
            f"up to {_where(part.sdn, part.exit)}, for which all of the network is traced. {EAGER}"
        ) from error


def _running(sdn: ShallowDeepNetwork, error: BaseException) -> str:
    """The innermost submodule that was running when an error arose."""
    names = {module: name for name, module in sdn.named_modules() if name}
    found = "the network"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names:
            found = f"{names[module]} ({type(module).__name__})"
    return found


def _where(sdn: ShallowDeepNetwork, exit: int) -> str:
    return "the last exit" if exit == sdn.num_exits - 1 else f"exit {exit} ({sdn.taps[exit]})"


def _trimmed(module: fx.GraphModule, names: Sequence[str]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A graph that takes and gives tensors by position, without dead code, unused inputs and unused weights."""
    graph = module.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_module":  # the exporter's checks of its inputs
            graph.erase_node(node)
        elif node.target is torch.ops.aten.clone.default and not node.kwargs:  # what dropout leaves behind
            node.replace_all_uses_with(node.args[0])
        elif node.target is torch.ops.aten.view.default:  # right for one memory format alone
            node.target = torch.ops.aten.reshape.default
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) > len(names):  # the features that the first stage has not got
        placeholders, spare = placeholders[1:], placeholders[:1]
        for node in spare:
            graph.erase_node(node)
    first = placeholders[0]
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sym_size.int and node.args[1] == 0 and node.args[0] in placeholders:
            node.args = (first, 0)  # all have as many rows; no input is carried along to count them
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    used = []
    for node, name in zip(placeholders, names, strict=True):
        if node.users:
            used.append(name)
        else:
            graph.erase_node(node)
    kept = {node.target for node in graph.nodes if node.op == "get_attr"}
    trimmed = fx.GraphModule({name: _attribute(module, name) for name in kept}, graph)
    return trimmed.eval(), tuple(used)


def _attribute(module: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)


def _check_work(
    sdn: ShallowDeepNetwork, body: Body, before: int | None, where: str, values: Mapping[str, Any], *, rows: int
) -> None:
    costs = sdn.costs
    expected = costs.backbone_flops[body.exit] + costs.head_flops[body.exit]
    expected -= 0 if before is None else costs.backbone_flops[before]
    with flop_counter() as counter:
        body.graph(*(values[name] for name in body.inputs))
    found = counter.get_total_flops() / rows
    if found > expected * 1.001:
        wanted = ", ".join(name for name in body.inputs if name != FEATURES) or "something made of weights alone"
        past = "" if before is None else f" Something goes past {sdn.taps[before]}: choose another tap."
        raise NetworkError(
            f"the stage up to {where} wants {wanted} once more and would repeat work: {found:.0f} FLOPs a "
            f"sample instead of {expected:.0f}.{past} {EAGER}"
        )


def fold_batch_norms(module: fx.GraphModule) -> None:
    """Put every batch-norm that follows a convolution into its weights, in place and as weights of the module's own.

    Weights that are computed (pruned, normalised or parametrised ones) are left alone, and so is their batch-norm.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten._native_batch_norm_legit_no_training.default:
            continue
        conv, *stats = node.args[:5]
        if not _is_convolution(conv) or len(conv.users) > 1:
            continue
        given = [one for one in conv.args[1:3] if one is not None]  # a convolution may have no bias
        if not all(_is_weight(one) for one in (*given, *stats)):
            continue
        weight, bias = (_weight(module, node) for node in (*conv.args[1:3], None)[:2])
        scale, shift, mean, var = (_weight(module, stat) for stat in stats)
        fused = fuse_conv_bn_weights(weight, bias, mean, var, node.args[6], scale, shift)
        with graph.inserting_before(conv):
            names = [f"{conv.name}_{kind}" for kind in ("weight", "bias")]
            for name, tensor in zip(names, fused, strict=True):
                setattr(module, name, nn.Parameter(tensor.detach(), requires_grad=False))
            conv.args = (conv.args[0], *(graph.get_attr(name) for name in names), *conv.args[3:])
        for user in list(node.users):  # batch-norm gives three outputs, of which only the first is one
            user.replace_all_uses_with(conv)
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    kept = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        if name not in kept:
            parent, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(parent), leaf)
    module.recompile()


def _weight(module: nn.Module, node: Any) -> Any:
    return _attribute(module, node.target) if _is_weight(node) else None


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _is_convolution(node: Any) -> bool:
    aten = torch.ops.aten
    kinds = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding)
    return isinstance(node, fx.Node) and node.target in kinds
