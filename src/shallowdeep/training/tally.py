"""Loss and accuracy of every exit over a pass, of one process or of all together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shallowdeep.data.samples import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Tally:
    """What a pass over some data has met so far; ``total`` adds up what all processes have met."""

    device: torch.device
    num_exits: int | None = None  # needed where a process may meet no batch
    loss: Any = 0.0
    right: Any = 0
    num_batches: int = 0
    num_samples: int = 0
    labelled: bool = True

    def add(self, batch: Batch, logits: list[Tensor], loss: Tensor | float = 0.0) -> None:
        """Count a batch: how many labels each exit finds, or, without labels, of the last exit's answers."""
        self.labelled = batch.labels is not None
        wanted = logits[-1].argmax(1) if batch.labels is None else batch.labels
        self.right = self.right + (torch.stack([x.argmax(1) for x in logits]) == wanted).sum(1)
        self.loss = self.loss + loss
        self.num_batches += 1
        self.num_samples += len(wanted)

    def total(self, fabric: Fabric) -> tuple[float, list[float]]:
        """Mean loss, and the share each exit has right."""
        loss = torch.as_tensor(self.loss, dtype=torch.float32, device=self.device)
        if self.num_batches == 0 and self.num_exits is not None:
            self.right = torch.zeros(self.num_exits, dtype=torch.int64, device=self.device)
        counts = torch.tensor([self.num_batches, self.num_samples], device=self.device)
        totals: Any = fabric.all_reduce({"loss": loss, "right": self.right, "counts": counts}, reduce_op="sum")
        num_batches, num_samples = totals["counts"].tolist()
        return float(totals["loss"]) / max(num_batches, 1), (totals["right"] / max(num_samples, 1)).tolist()

    @property
    def name(self) -> str:
        """Of the share: ``"accuracy"``, or ``"agreement"`` without labels."""
        return "accuracy" if self.labelled else "agreement"
