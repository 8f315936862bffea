"""A whole Shallow-Deep Network as one network: what its stages and its engine are compared to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.networks.costs import Costs
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import tapped


def in_one_piece(sdn: ShallowDeepNetwork, exits: Sequence[int]) -> ShallowDeepNetwork:
    """A network without exits whose logits are those of some exits of another, side by side.

    It runs in every back end as one graph, with all heads and without a policy. What a softmax over its columns says
    means nothing; its time is that of the whole Shallow-Deep Network.

    Args:
        sdn: not changed; the weights are its own.
        exits: to be computed, rising, the last one among them.
    """
    costs = sdn.costs
    own = Costs(
        (costs.backbone_flops[-1] + sum(costs.head_flops[exit] for exit in exits),),
        (0,),
        (costs.backbone_params[-1] + sum(costs.head_params[exit] for exit in exits),),
        (0,),
    )
    return ShallowDeepNetwork(
        _AllExits(sdn, exits), [], [], own, label_spaces={"all exits": len(exits) * sdn.num_outputs}
    )


class _AllExits(nn.Module):
    def __init__(self, sdn: ShallowDeepNetwork, exits: Sequence[int]):
        super().__init__()
        self.sdn, self.internal = sdn, [exit for exit in exits if exit < sdn.num_exits - 1]

    def forward(self, *args: Any, **named: Any) -> Tensor:
        taps = {exit: self.sdn.taps[exit] for exit in self.internal}
        with tapped(self.sdn.backbone, list(taps.values())) as found:
            last = self.sdn.run_backbone(named or (args[0] if len(args) == 1 else args))
        return torch.cat([*(self.sdn.exits[exit](found[tap]) for exit, tap in taps.items()), last], dim=1)
