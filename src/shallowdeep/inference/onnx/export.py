"""A network in stages as ONNX: to be run in this process, or as a folder that needs no PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import shutil
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shallowdeep.data.samples import Splits
from shallowdeep.errors import ConfigError, NetworkError, UnknownName, require
from shallowdeep.inference import runner
from shallowdeep.inference.backends import Order
from shallowdeep.inference.onnx.fold import StageModel, fold
from shallowdeep.inference.onnx.parity import Parity, check_folder, extremes_of
from shallowdeep.inference.onnx.quantize import quantize_stages
from shallowdeep.inference.runner import OUT, Cascade, OnnxStages, Runner, RunnerError, Settings, Timing, Values
from shallowdeep.inference.stages import EXPORT_ROWS, Stage, as_values, cut, thresholds_of
from shallowdeep.networks.calls import distinct_rows, first_line
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy, exits_of
from shallowdeep.storage import making, write_json

OPSET = 20
MICRO_BATCH = 32  # rows at a time at which ONNX Runtime is best; larger blocks go back to the system in between
PRECISIONS = ("fp32", "int8")
LAZINESS_REPEATS = 20


@dataclass(frozen=True)
class Pixels:
    """Normalisation inside the first stage: it takes uint8 images.

    Attributes:
        name: of the network's input that images go into.
        mean: one per channel, of pixels scaled to 0 .. 1.
        std: one per channel, of pixels scaled to 0 .. 1.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """As a batch of an ``ImageSet`` is."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.float().mul(1 / (255 * std)).sub(mean / std)

    def pixels(self, images: Tensor) -> Tensor:
        """The other way round: the nearest uint8 images."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Export:
    """An exported folder.

    Attributes:
        folder: where it is.
        files: name to size in bytes.
        parity: how far it is from PyTorch's stages.
        timings: of the self-exiting files on this machine, where they could be timed.
        manifest: what ``manifest.json`` says.
    """

    folder: Path
    files: dict[str, int]
    parity: Parity
    timings: tuple[Timing, ...]
    manifest: dict[str, Any]

    def __str__(self) -> str:
        size = sum(size for name, size in self.files.items() if name.startswith("stage_"))
        lines = [
            f"{self.folder}: {len(self.manifest['stages'])} stages in {self.manifest['precision']}, "
            f"{size / 1e6:.2f} MB; {', '.join(self.files)}",
            str(self.parity),
        ]
        for timing in self.timings:
            verdict = "" if timing.leaves_early else "; this provider does not leave early: use the stages"
            lines.append(
                f"{timing.form}.onnx: leaving at the first exit takes {timing.ratio:.2f} of going through{verdict}"
            )
        return "\n".join(lines)


def export(
    sdn: ShallowDeepNetwork,
    policy: ExitPolicy,
    folder: str | Path,
    *,
    example_inputs: Any,
    precision: str = "fp32",
    preprocessing: Any = None,
    calibration: Any = None,
    single: bool = True,
    batched: bool = True,
    opset: int = OPSET,
    class_names: Sequence[str] | None = None,
) -> Export:
    """Write a network and its policy as a folder that runs without PyTorch.

    In it are the stages, two files that leave by themselves (one for a single sample, one for batches), a
    manifest, and ``run.py``, which needs numpy and onnxruntime alone. The thresholds are inputs of the graphs.

    Args:
        sdn: not changed.
        policy: when to stop.
        folder: not there yet, or empty; written whole or not at all.
        example_inputs: what the network takes, any batch size. Its rows serve for checking what was written.
        precision: ``"fp32"`` or ``"int8"``; calibrate the policy anew on an int8 Trace (``Engine.record``).
        preprocessing: the folder shall take uint8 images and normalise them in the graph: anything with ``mean``
            and ``std`` of pixels scaled to 0 .. 1, as ``Splits``, ``ImageSet``, ``Preprocessing`` or a mapping.
        calibration: for int8: inputs as the network takes them, some hundred real ones.
        single: write the self-exiting file for one sample.
        batched: write the self-exiting file for batches.
        opset: of ONNX operators.
        class_names: one per output, for whoever uses the folder.

    Raises:
        ConfigError: the folder is not empty, or an option does not fit.
        NetworkError: a stage cannot be exported, or what was written does not answer as PyTorch's stages do.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already. Name a new folder, or remove it.")
    if precision not in PRECISIONS:
        raise UnknownName("precision of an export", precision, PRECISIONS)
    if class_names is not None and len(class_names) != sdn.num_outputs:
        raise ConfigError(f"{len(class_names)} class names do not fit {sdn.num_outputs} outputs.")
    _check_calibration(precision, calibration)
    pixels = None if preprocessing is None else _pixels(preprocessing, example_inputs)
    policy = as_typed(policy)
    cut_up = convert(sdn, policy, example_inputs, pixels=pixels, opset=opset)
    floats = cut_up.models
    models = floats if precision == "fp32" else quantised(cut_up, policy, calibration)
    with making(folder) as partial:
        shutil.copyfile(runner.__file__, partial / "run.py")
        manifest = _manifest(sdn, policy, cut_up, precision, opset, class_names)
        manifest["stages"] = [_stage_part(partial, place, model) for place, model in enumerate(models)]
        thresholds = list(thresholds_of(policy))
        for form, wanted in (("single", single), ("batched", batched)):
            if wanted:
                folded = fold(models, thresholds, batched=form == "batched")
                manifest[form] = _write_model(partial, f"{form}.onnx", folded)
        if precision == "int8":
            manifest["bytes_of_fp32"] = sum(len(one.model.SerializeToString()) for one in floats)
        write_json(partial / runner.MANIFEST, manifest)
        try:
            parity = check_folder(partial, cut_up, policy, precision)
            manifest["parity"] = dataclasses.asdict(parity)
            manifest["extremes"] = extremes_of(partial, policy)
            write_json(partial / runner.MANIFEST, manifest)
            timings = _laziness(partial, manifest)
        except RunnerError as error:
            raise NetworkError(f"what was exported does not run: {error}") from error
        manifest["laziness"] = [_laziness_part(timing) for timing in timings]
        write_json(partial / runner.MANIFEST, manifest)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    return Export(folder, files, parity, timings, manifest)


@dataclass(frozen=True)
class Converted:
    """A network as ONNX stages, beside what they were made of.

    Attributes:
        models: shallow to deep.
        modules: the same stages in PyTorch.
        examples: inputs of the network by name, on the CPU, a few rows that differ.
        pixels: of the normalisation inside.
        num_outputs: columns of every exit's logits.
    """

    models: list[StageModel]
    modules: list[Stage]
    examples: dict[str, Tensor]
    pixels: Pixels | None
    num_outputs: int

    @property
    def inputs(self) -> Values:
        """The examples as the exported stages take them."""
        pixels = self.pixels
        return {
            name: (pixels.pixels(value) if pixels is not None and name == pixels.name else value).numpy()
            for name, value in self.examples.items()
        }

    @property
    def reference(self) -> dict[str, Tensor]:
        """The same examples as the network takes them."""
        pixels = self.pixels
        return {
            name: pixels.normalise(pixels.pixels(value)) if pixels is not None and name == pixels.name else value
            for name, value in self.examples.items()
        }


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
    converted = Converted([], modules, examples, pixels, sdn.num_outputs)
    values: dict[str, Tensor] = {**converted.reference}
    if pixels is not None:
        values[pixels.name] = pixels.pixels(examples[pixels.name])
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
        with warnings.catch_warnings():
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
            f"the stage up to {where} has no ONNX form: {first_line(why)}. Use backend='eager' or 'compiled'."
        ) from error
    (found,) = (entry.version for entry in model.opset_import if entry.domain == "")
    if found != opset:
        raise NetworkError(f"the stage up to {where} cannot be written in opset {opset}. Use opset={OPSET}.")
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


def _check_calibration(precision: str, calibration: Any) -> None:
    if precision != "int8" and calibration is not None:
        raise ConfigError(f"calibration= is for precision='int8', not for {precision!r}.")
    if precision == "int8" and calibration is None:
        raise ConfigError("int8 is calibrated on real inputs. Pass calibration=, some hundred of them.")


def quantised(converted: Converted, policy: ExitPolicy, calibration: Any) -> list[StageModel]:
    """The stages in int8.

    Raises:
        ConfigError: the inputs to calibrate on are not the network's.
    """
    values = {name: value.detach().cpu() for name, value in as_values(calibration).items()}
    if values.keys() != converted.examples.keys():
        raise ConfigError(f"the network takes {', '.join(converted.examples)}; calibration has {', '.join(values)}.")
    pixels = converted.pixels
    arrays = {
        name: (pixels.pixels(value) if pixels is not None and name == pixels.name else value).numpy()
        for name, value in values.items()
    }
    return quantize_stages(converted.models, thresholds_of(policy), arrays, threads=torch.get_num_threads())


def build_onnx(order: Order) -> Cascade:
    """Stages in ONNX Runtime, in this process.

    Options: ``threads`` (``None``: as many as PyTorch uses), ``providers``, ``spinning``, ``shared_pool`` (see
    ``runner.Settings``), and for int8 ``calibration``, inputs as the network takes them.
    """
    require("onnxruntime", extra="onnx")
    options = order.take_options("threads", "providers", "spinning", "shared_pool", "calibration")
    models, policy = models_for(order, options.pop("calibration", None))
    threads = options.pop("threads", None)
    if "providers" in options:
        options["providers"] = tuple(options["providers"])
    settings = Settings(threads=torch.get_num_threads() if threads is None else threads, **options)
    files = [model.model.SerializeToString() for model in models]
    try:
        stages = OnnxStages(files, order.exits, thresholds_of(policy), settings)
    except RunnerError as error:
        raise ConfigError(f"backend='onnx': {error}") from error
    return Cascade(stages, order.costs, micro_batch=order.micro_batch or MICRO_BATCH)


def models_for(order: Order, calibration: Any) -> tuple[list[StageModel], ExitPolicy]:
    """The stages that an order asks for as ONNX models, and its policy as it is in them."""
    _check_calibration(order.precision, calibration)
    policy = as_typed(order.policy)
    converted = convert(order.sdn, policy, order.example_inputs)
    return (quantised(converted, policy, calibration) if order.precision == "int8" else converted.models), policy


def _pixels(preprocessing: Any, example_inputs: Any) -> Pixels:
    found = preprocessing.train if isinstance(preprocessing, Splits) else preprocessing
    mean, std = (
        found.get(name) if isinstance(found, Mapping) else getattr(found, name, None) for name in ("mean", "std")
    )
    if mean is None or std is None:
        raise ConfigError(f"preprocessing has a mean and a std of every channel; this {type(found).__name__} has not.")
    images = [
        name for name, value in as_values(example_inputs).items() if value.ndim == 4 and value.is_floating_point()
    ]
    if len(images) != 1:
        raise ConfigError(f"preprocessing takes a network with one input of images, got {len(images)}.")
    channels = as_values(example_inputs)[images[0]].shape[1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(f"mean {mean} and std {std} do not fit {channels} channels: one of each, every std above 0.")
    return Pixels(images[0], tuple(map(float, mean)), tuple(map(float, std)))


def _manifest(
    sdn: ShallowDeepNetwork,
    policy: ExitPolicy,
    converted: Converted,
    precision: str,
    opset: int,
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    exits = exits_of(policy, sdn.num_exits)
    pixels = converted.pixels
    return {
        "kind": "shallowdeep export",
        "format": runner.FORMAT,
        "model": type(sdn.backbone).__name__,
        "taps": list(sdn.taps),
        "exits": exits,
        "costs": sdn.costs.relative(exits[:-1])[exits].tolist(),
        "policy": policy.to_dict(),
        "thresholds": thresholds_of(policy),
        "extremes": None,
        "precision": precision,
        "inputs": [
            {
                "name": name,
                "dtype": str(value.dtype),
                "shape": list(value.shape[1:]),
                "range": [value.min().item(), value.max().item()],
            }
            for name, value in converted.inputs.items()
        ],
        "num_outputs": sdn.num_outputs,
        "label_spaces": dict(sdn.label_spaces),
        "class_names": None if class_names is None else list(class_names),
        "preprocessing": None if pixels is None else {"mean": list(pixels.mean), "std": list(pixels.std)},
        "opset": opset,
        "versions": {name: require(name, extra="onnx").__version__ for name in ("torch", "onnx", "onnxruntime")},
        "stages": [],
        "single": None,
        "batched": None,
    }


def _stage_part(folder: Path, place: int, model: StageModel) -> dict[str, Any]:
    written = _write_model(folder, f"stage_{place}.onnx", model.model)
    return {**written, "exit": model.exit, "inputs": model.inputs, "outputs": model.outputs}


def _write_model(folder: Path, name: str, model: Any) -> dict[str, Any]:
    data = model.SerializeToString()
    (folder / name).write_bytes(data)
    return {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _laziness(folder: Path, manifest: Mapping[str, Any]) -> tuple[Timing, ...]:
    if manifest["extremes"] is None:
        return ()
    settings = Settings(threads=torch.get_num_threads())
    forms = [form for form in ("single", "batched") if manifest[form] is not None]
    return tuple(runner.time_leaving(Runner(folder, form, settings=settings), 1, LAZINESS_REPEATS) for form in forms)


def _laziness_part(timing: Timing) -> dict[str, Any]:
    return {
        **dataclasses.asdict(timing),
        "ratio": timing.ratio,
        "provider": "CPUExecutionProvider",
        "leaves_early": timing.leaves_early,
        "note": "" if timing.leaves_early else "this provider does not leave early: use the stages",
    }
