"""What ``truncate`` gives: a network that ends at one exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shallowdeep.networks.calls import LogitsOf, call, find_logits
from shallowdeep.networks.taps import run_until


class FinalHeadNetwork(nn.Module):
    """A backbone followed by a final head: inputs to the last exit's logits ``(n, outputs)``."""

    def __init__(self, backbone: nn.Module, final_head: nn.Module, logits: LogitsOf | None):
        super().__init__()
        self.backbone = backbone
        self.final_head = final_head
        self._logits_of = logits

    def forward(self, x: Any) -> Tensor:
        """Logits of the last exit."""
        return self.final_head(find_logits(call(self.backbone, x), self._logits_of))


class TruncatedNetwork(nn.Module):
    """A backbone that runs only as far as a tap, and the exit there.

    Args:
        backbone: changed: the modules named in ``unreached`` are taken out.
        tap: where to stop.
        head: the exit at the tap.
        unreached: submodules that never run before the tap is done.
    """

    def __init__(self, backbone: nn.Module, tap: str, head: nn.Module, unreached: Sequence[str]):
        super().__init__()
        self.backbone = backbone
        self.tap = tap
        self.head = head
        for name in unreached:
            parent, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(parent), leaf, nn.Identity())

    def forward(self, x: Any) -> Tensor:
        """Logits of the exit, ``(n, outputs)``."""
        return self.head(run_until(self.backbone, self.tap, x))
