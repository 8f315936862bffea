"""Networks that bring their own exits (MSDNet, BranchyNet): recorded and analysed as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from shallowdeep.errors import NetworkError
from shallowdeep.networks.calls import batch_size, call, call_on_example, evaluating, find_logits
from shallowdeep.networks.costs import Costs, count_params, flop_counter
from shallowdeep.networks.sites import params_entered
from shallowdeep.networks.taps import submodule, watched

ExitsOf = Callable[[Any], Sequence[Tensor]]
"""Takes what a network returned and gives its exits' logits, each ``(n, outputs)``, from first to last."""


class MultiExitNetwork(nn.Module):
    """A network with exits of its own, or with one output, so that it can be recorded like a Shallow-Deep Network.

    - input: whatever the network takes
    - output: a list with one logits tensor ``(n, outputs)`` per exit

    What each exit costs is measured in one forward: the computation done when the module that gives out its
    logits is finished, that module itself counted as the exit's head. The last exit's module belongs to the
    backbone: the network without its other heads costs 1.0.

    Args:
        net: returns a list or tuple of logits from the first exit to the last, or one logits tensor; used as it is.
        example_inputs: what the network takes, of any batch size.
        costs: of its exits, where they cannot be measured.
        exits_of: takes the logits out of what the network returns, where that is no plain list.

    Raises:
        NetworkError: the exits differ in width, or what they cost cannot be told.

    Attributes:
        backbone: the network as it was given.
        taps: names of the modules that give out the exits' logits, the last one's left out; empty where
            ``costs`` were given.
        costs: FLOPs and parameters to each exit.
        label_spaces: ``{"labels": outputs}``.

    >>> import torch
    >>> MultiExitNetwork(nn.Linear(3, 2), torch.zeros(1, 3)).costs.backbone_flops
    (12,)
    """

    def __init__(
        self, net: nn.Module, example_inputs: Any, *, costs: Costs | None = None, exits_of: ExitsOf | None = None
    ):
        super().__init__()
        self.backbone = net
        self._exits_of = exits_of
        watch = _watch(net, example_inputs, exits_of)
        if costs is None:
            heads = [_head(watch, i) for i in range(len(watch.logits))]
            self.taps = tuple(head.name for head in heads[:-1])
            self.costs = _measured(net, watch, heads, batch_size(example_inputs))
        else:
            self.taps = ()
            self.costs = costs
        self.label_spaces = {"labels": watch.logits[0].shape[1]}
        self._check_count(len(watch.logits))

    @property
    def num_exits(self) -> int:
        """Number of exits, the last included."""
        return self.costs.num_exits

    @property
    def num_outputs(self) -> int:
        """Columns of every exit's logits."""
        return sum(self.label_spaces.values())

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Nothing to keep open: this network's exits need no hooks."""
        yield

    def forward(self, x: Any) -> list[Tensor]:
        """Logits of every exit, from first to last."""
        found = find_exits(call(self.backbone, x), self._exits_of)
        self._check_count(len(found))
        return found

    def run_backbone(self, x: Any) -> Tensor:
        """Logits of the last exit alone."""
        return self.forward(x)[-1]

    def _check_count(self, found: int) -> None:
        if found != self.num_exits:
            raise NetworkError(
                f"the network gave logits of {found} exits where costs tell of {self.num_exits}. "
                "Let it compute every exit, and pass costs= with one entry for each."
            )


def find_exits(output: Any, exits_of: ExitsOf | None = None) -> list[Tensor]:
    """The logits of every exit in what a network returned.

    Args:
        output: a list or tuple of logits, or whatever ``attach`` takes one logits tensor from.
        exits_of: takes them out of anything else.

    Raises:
        NetworkError: there are none, or they differ in shape.
    """
    if exits_of is not None:
        found = list(exits_of(output))
    elif isinstance(output, list | tuple) and not hasattr(output, "logits") and all(map(_is_logits, output)):
        found = list(output)
    else:
        found = [find_logits(output)]
    shapes = {tuple(logits.shape) if _is_logits(logits) else None for logits in found}
    if len(shapes) != 1 or None in shapes:
        raise NetworkError(
            f"the exits' logits must have one shape (n, outputs), got {sorted(map(str, shapes))}. "
            "Pass exits_of=, a function that takes them out of the network's output."
        )
    return found


def _is_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


@dataclass(frozen=True)
class _Leave:
    """A module that was done: what it gave out, and what had been computed and entered by then."""

    name: str
    output: Tensor
    flops: int
    own_flops: int
    entered: int


@dataclass(frozen=True)
class _Watch:
    leaves: list[_Leave]
    logits: list[Tensor]
    entered: list[str]
    flops: int


def _watch(net: nn.Module, inputs: Any, exits_of: ExitsOf | None) -> _Watch:
    leaves: list[_Leave] = []
    starts: list[int] = []
    entered: dict[str, None] = {}

    def enter(name: str, module_inputs: Any) -> None:
        entered[name] = None
        starts.append(counter.get_total_flops())

    def leave(name: str, output: Any) -> None:
        start, flops = starts.pop(), counter.get_total_flops()
        if _is_logits(output):
            leaves.append(_Leave(name, output, flops, flops - start, len(entered)))

    with evaluating(net), flop_counter() as counter, watched(net, enter, leave):
        logits = find_exits(call_on_example(net, inputs), exits_of)
    return _Watch(leaves, logits, list(entered), counter.get_total_flops())


def _head(watch: _Watch, exit: int) -> _Leave:
    """The outermost module whose output is an exit's logits."""
    found = [leave for leave in watch.leaves if leave.output is watch.logits[exit]]
    if not found and exit == len(watch.logits) - 1:  # computed in the network's own forward: no head to tell apart
        return _Leave("", watch.logits[exit], watch.flops, 0, len(watch.entered))
    if not found:
        raise NetworkError(
            f"the logits of exit {exit} are no submodule's output, so what it costs cannot be measured. "
            "Give that exit a module of its own, or pass costs=."
        )
    return found[-1]


def _measured(net: nn.Module, watch: _Watch, heads: Sequence[_Leave], rows: int) -> Costs:
    flops, params = [], []
    entered, inner = params_entered(net, watch.entered), list(heads[:-1])
    for i, head in enumerate(heads):
        earlier = heads[:i]
        flops.append(head.flops - sum(other.own_flops for other in earlier))
        params.append(entered[head.entered] - _own_params(net, earlier))
    before = [total - head.own_flops for total, head in zip(flops, heads, strict=True)]
    if any(late <= early for early, late in pairwise(before)):
        raise NetworkError(
            f"what the exits {', '.join(head.name or 'last' for head in heads)} cost cannot be told: they are not "
            "computed from first to last, or with none of the network's own computation between two of them. "
            "Pass costs=, or exits_of= for another order."
        )
    return Costs(
        backbone_flops=(*(total // rows for total in before[:-1]), flops[-1] // rows),
        head_flops=(*(head.own_flops // rows for head in inner), 0),
        backbone_params=(
            *(total - _own_params(net, [head]) for total, head in zip(params, inner, strict=False)),
            count_params(net) - _own_params(net, inner),
        ),
        head_params=(*(_own_params(net, [head]) for head in inner), 0),
    )


def _own_params(net: nn.Module, heads: Sequence[_Leave]) -> int:
    """Parameters of some heads' modules, shared ones once."""
    parameters = {id(p): p.numel() for head in heads for p in submodule(net, head.name).parameters()}
    return sum(parameters.values())
