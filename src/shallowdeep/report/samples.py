"""What every exit said of every sample, packed for the browser, and the decisions it starts from."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.policies.rules import Confidence, exits_of
from shallowdeep.traces.trace import Trace


@dataclass(frozen=True)
class PackedSamples:
    """What the page needs to replay ``Confidence`` at any threshold, as the browser reads it.

    Attributes:
        n: samples.
        exits: that the policy is run at, the last one included; the arrays hold all exits all the same.
        costs: of leaving at each of them, as a share of the plain network.
        num_exits: of the network.
        answer: of the unsure, as for ``Confidence``.
        confidences: float32, little-endian, base64: exit by exit, each one's samples in order.
        predictions: uint8 or uint16, likewise.
        labels: likewise, one per sample.
        bytes_per_class: 1 or 2, of predictions and labels.
    """

    n: int
    exits: tuple[int, ...]
    costs: tuple[float, ...]
    num_exits: int
    answer: str
    confidences: str
    predictions: str
    labels: str
    bytes_per_class: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return vars(self)


def pack(trace: Trace, policy: Confidence) -> PackedSamples:
    """Pack a Trace for the browser.

    Args:
        trace: with labels.
        policy: whose exits and answer count; its threshold does not.

    Raises:
        ConfigError: the policy looks at an exit that is not there.
        TraceError: there are no labels.
    """
    used = exits_of(policy, trace.num_exits)
    wide = max(logits.shape[1] for logits in trace.logits) > 256
    kind = "<u2" if wide else "<u1"
    return PackedSamples(
        n=len(trace),
        exits=tuple(used),
        costs=tuple(trace.costs.relative(used[:-1])[used].tolist()),
        num_exits=trace.num_exits,
        answer=policy.answer,
        confidences=_base64(trace.confidences.T, "<f4"),
        predictions=_base64(trace.predictions.T, kind),
        labels=_base64(trace.true_labels, kind),
        bytes_per_class=2 if wide else 1,
    )


def _base64(values: Tensor, kind: str) -> str:
    array = values.contiguous().to(torch.float32 if kind == "<f4" else torch.int64).numpy()
    return base64.b64encode(np.ascontiguousarray(array.astype(kind)).tobytes()).decode("ascii")
