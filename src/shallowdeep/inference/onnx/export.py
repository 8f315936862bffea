"""A network in stages as a folder that needs no PyTorch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shallowdeep.errors import ConfigError, NetworkError, UnknownName
from shallowdeep.inference.onnx.convert import OPSET, as_typed, convert
from shallowdeep.inference.onnx.fold import StageModel, check_nesting, fold
from shallowdeep.inference.onnx.joined import joined
from shallowdeep.inference.onnx.manifest import NOT_LAZY, describe, describe_laziness
from shallowdeep.inference.onnx.parity import Parity, check_folder, extremes_of
from shallowdeep.inference.onnx.pixels import pixels_of
from shallowdeep.inference.onnx.precisions import PRECISIONS, WEIGHT_BITS, check_calibration, laid_out, models_in
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.manifest import MANIFEST
from shallowdeep.inference.runner.sessions import RunnerError, Settings
from shallowdeep.inference.runner.timing import Timing, time_leaving
from shallowdeep.inference.stages import check_label_sets, thresholds_of
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy, exits_of
from shallowdeep.storage import making, write_json, write_text

LAZINESS_REPEATS = 20
PROVIDER = "CPUExecutionProvider"  # that an export is timed on; ``write_laziness`` adds others


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
            verdict = "" if timing.leaves_early else f"; {NOT_LAZY}"
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
    weight_bits: int | None = None,
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
        weight_bits: of int8: 7 (``None`` means that), or 8, for processors with VNNI.

    Raises:
        ConfigError: the folder is not empty, or an option does not fit.
        NetworkError: the network answers in several label sets, a stage cannot be exported, or what was written does
            not answer as the network does.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already. Name a new folder, or remove it.")
    if precision not in PRECISIONS:
        raise UnknownName("precision of an export", precision, PRECISIONS)
    if class_names is not None and len(class_names) != sdn.num_outputs:
        raise ConfigError(f"{len(class_names)} class names do not fit {sdn.num_outputs} outputs.")
    check_label_sets(sdn)
    check_calibration(precision, calibration, weight_bits)
    if single or batched:
        check_nesting(len(exits_of(policy, sdn.num_exits)))
    pixels = None if preprocessing is None else pixels_of(preprocessing, example_inputs)
    policy = as_typed(policy)
    cut_up = convert(sdn, policy, example_inputs, pixels=pixels, opset=opset)
    floats = cut_up.models
    models = laid_out(models_in(precision, cut_up, policy, calibration, weight_bits), precision)
    with making(folder) as partial:
        write_text(partial / "run.py", joined("shallowdeep.inference.runner.command"))
        manifest = describe(sdn, policy, cut_up, precision, opset, class_names)
        manifest["stages"] = [_stage_part(partial, place, model) for place, model in enumerate(models)]
        thresholds = list(thresholds_of(policy))
        for form, wanted in (("single", single), ("batched", batched)):
            if wanted:
                folded = fold(models, thresholds, batched=form == "batched")
                manifest[form] = _write_model(partial, f"{form}.onnx", folded)
        if precision == "int8":
            manifest["weight_bits"] = weight_bits or WEIGHT_BITS[0]
            manifest["bytes_of_fp32"] = sum(len(one.model.SerializeToString()) for one in floats)
        write_json(partial / MANIFEST, manifest)
        try:
            parity = check_folder(partial, cut_up, policy, precision)
            manifest["parity"] = dataclasses.asdict(parity)
            manifest["extremes"] = extremes_of(partial, policy)
            write_json(partial / MANIFEST, manifest)
            timings = _laziness(partial, manifest)
        except RunnerError as error:
            raise NetworkError(f"what was exported does not run: {error}") from error
        manifest["laziness"] = {PROVIDER: describe_laziness(timings)}
        write_json(partial / MANIFEST, manifest)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    return Export(folder, files, parity, timings, manifest)


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
    settings = Settings(threads=torch.get_num_threads(), providers=(PROVIDER,))
    forms = [form for form in ("single", "batched") if manifest[form] is not None]
    return tuple(time_leaving(Runner(folder, form, settings=settings), 1, LAZINESS_REPEATS) for form in forms)
