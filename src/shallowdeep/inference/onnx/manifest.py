"""What the manifest of an exported folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.errors import require
from shallowdeep.inference.onnx.convert import Converted
from shallowdeep.inference.runner.manifest import FORMAT, MANIFEST, read_manifest
from shallowdeep.inference.runner.timing import Bench, Timing
from shallowdeep.inference.stages import thresholds_of
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy, exits_of
from shallowdeep.storage import write_json

NOT_LAZY = "this provider does not leave early: use the stages"


def describe(
    sdn: ShallowDeepNetwork,
    policy: ExitPolicy,
    converted: Converted,
    precision: str,
    opset: int,
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    """What is known before anything is written; the files, their parity and times are still to be filled in."""
    exits = exits_of(policy, sdn.num_exits)
    pixels = converted.pixels
    return {
        "kind": "shallowdeep export",
        "format": FORMAT,
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
                "range": _range(value),
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


def _range(value: np.ndarray) -> list[float | int]:
    """Its smallest and its largest number; truth values as 0 and 1, since the manifest's reader takes them for none."""
    numbers = value.astype(np.uint8) if value.dtype == np.bool_ else value
    return [numbers.min().item(), numbers.max().item()]


def describe_laziness(timings: Iterable[Timing]) -> list[dict[str, Any]]:
    """Whether the self-exiting files leave early on one provider, one entry per form and batch size."""
    return [
        {
            **dataclasses.asdict(timing),
            "ratio": timing.ratio,
            "leaves_early": timing.leaves_early,
            "note": "" if timing.leaves_early else NOT_LAZY,
        }
        for timing in timings
        if timing.form != "stages"
    ]


def write_laziness(folder: str | Path, bench: Bench) -> None:
    """Write what a provider was timed at into an exported folder, as ``laziness[provider]`` of its manifest.

    An earlier timing of the same provider is replaced, those of others are kept. The manifest says the hashes of the
    other files and none of its own, so the folder stays valid; it is written whole or not at all.

    Args:
        folder: what ``export`` wrote.
        bench: what ``runner.timing.bench`` found there.

    Raises:
        RunnerError: the folder has no usable manifest.
        OSError: it cannot be written.
    """
    manifest = read_manifest(Path(folder))
    earlier = manifest.get("laziness")
    others = earlier if isinstance(earlier, dict) else {}  # in older folders it is a list, of the CPU's provider alone
    manifest["laziness"] = {**others, bench.provider: describe_laziness(bench.timings)}
    write_json(Path(folder) / MANIFEST, manifest)
