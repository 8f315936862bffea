"""Where a phase is trained, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from shallowdeep.errors import ConfigError
from shallowdeep.processes import make_fabric
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import Phase

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["fp32", "bf16"]
IN_FABRIC: dict[Precision, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Place:
    """Where a run happens, in Fabric's words."""

    device: str
    devices: int | None
    num_nodes: int

    def fabric(self, phase: Phase) -> Fabric:
        """Fabric for a phase.

        Raises:
            ConfigError: there is no such device, or a batch cannot be shared out evenly among the processes.
        """
        recipe = phase.recipe
        fabric = make_fabric(
            self.device,
            devices=self.devices,
            num_nodes=self.num_nodes,
            precision=IN_FABRIC[self.precision(recipe)],
            all_used=phase.trains == "exits",
        )
        if recipe.batch_size % fabric.world_size:
            raise ConfigError(
                f"a batch of {recipe.batch_size} cannot be shared out evenly among {fabric.world_size} processes. "
                "Take a multiple (recipe.batch_size)."
            )
        return fabric

    def precision(self, recipe: Recipe) -> Precision:
        """The precision a recipe has here."""
        if recipe.precision == "auto":
            return "bf16" if computes_in_bf16(self.device) else "fp32"
        return recipe.precision


def computes_in_bf16(device: str) -> bool:
    """Whether a device multiplies in bf16, rather than emulating it."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
