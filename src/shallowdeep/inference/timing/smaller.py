"""Networks that end at one exit for every sample: what one might train instead of leaving early."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shallowdeep.networks.costs import Costs
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import tapped


def ending_at(sdn: ShallowDeepNetwork, exit: int, *, exportable: bool) -> ShallowDeepNetwork:
    """A network that ends at an internal exit, as one without exits.

    Args:
        sdn: not changed.
        exit: index of the internal exit.
        exportable: over the same weights, in a form that stages can be exported from; else what ``truncate`` gives.
    """
    costs = sdn.costs
    own = Costs(
        (costs.backbone_flops[exit] + costs.head_flops[exit],),
        (0,),
        (costs.backbone_params[exit] + costs.head_params[exit],),
        (0,),
    )
    net = _UpTo(sdn, exit) if exportable else sdn.truncate(exit)
    return ShallowDeepNetwork(net, [], [], own, label_spaces=sdn.label_spaces)


class _UpTo(nn.Module):
    """A network that answers at one of its exits, as it can be exported: what lies behind is dead code there."""

    def __init__(self, sdn: ShallowDeepNetwork, exit: int):
        super().__init__()
        self.sdn, self.exit = sdn, exit

    def forward(self, *args: Any, **named: Any) -> Tensor:
        tap = self.sdn.taps[self.exit]
        with tapped(self.sdn.backbone, [tap]) as found:
            self.sdn.run_backbone(named or (args[0] if len(args) == 1 else args))
        return self.sdn.exits[self.exit](found[tap])
