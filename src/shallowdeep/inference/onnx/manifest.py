"""What the manifest of an exported folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from shallowdeep.errors import require
from shallowdeep.inference.onnx.convert import Converted
from shallowdeep.inference.runner import FORMAT, Timing
from shallowdeep.inference.stages import thresholds_of
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import ExitPolicy, exits_of

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


def describe_timing(timing: Timing) -> dict[str, Any]:
    """Whether a self-exiting file leaves early on this machine."""
    return {
        **dataclasses.asdict(timing),
        "ratio": timing.ratio,
        "provider": "CPUExecutionProvider",
        "leaves_early": timing.leaves_early,
        "note": "" if timing.leaves_early else NOT_LAZY,
    }
