"""Where an exit may sit, proved by dropping rows, and what it costs to get there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from shallowdeep.errors import IllegalTap
from shallowdeep.networks.calls import (
    LogitsOf,
    call,
    distinct_rows,
    evaluating,
    exact_float32,
    example_logits,
    find_logits,
    first_line,
    first_tensor,
    taking_turns,
)
from shallowdeep.networks.costs import flop_counter
from shallowdeep.networks.taps import (
    RowInput,
    find_row_inputs,
    run_until,
    submodule,
    take_rows,
    watched,
)

PROOF_ROWS = 4
KEPT_ROWS = (1, 3)  # at least two of at least four: a single row could broadcast and look legal


@dataclass(frozen=True)
class Site:
    """Where an exit may sit.

    Attributes:
        name: the submodule's name, e.g. ``"layer2.1"``.
        shape: of its output for one sample, e.g. ``(32, 16, 16)``.
        flops: of the backbone for one sample, from the input up to and including here; 2 per multiply-add.
        legal: whether dropping rows here drops exactly those rows of the logits.
        why_not: the reason where it is not legal, else empty.
        params: parameters of the backbone used up to and including here.
        row_inputs: inputs of later submodules that hold a row for each sample too, such as an attention mask:
            the submodule's name and the input's place. Where rows are dropped here, they are dropped there.
    """

    name: str
    shape: tuple[int, ...]
    flops: int
    legal: bool
    why_not: str
    params: int = 0
    row_inputs: tuple[RowInput, ...] = ()


def probe(
    net: nn.Module, example_inputs: Any, *, split_over: float = 0.1, logits: LogitsOf | None = None
) -> list[Site]:
    """Find where exits may sit, by proof: drop rows at a submodule and see that exactly those logits stay.

    Four distinct samples are run through the network once to count FLOPs, then once per submodule with
    two of them dropped at its output. No tracing, and no tables per architecture.

    Args:
        net: any network; neither its weights nor its mode change.
        example_inputs: a tensor, tuple or mapping the network takes, of any batch size.
        split_over: look inside a legal submodule only where it costs more than this share of the
            network; 0 looks at every submodule.
        logits: takes the logits out of what the network returns, where that is not obvious.

    Returns:
        Sites in the order in which they are computed, legal ones and refused ones with the reason. FLOPs
        count 2 per multiply-add; batch-norm, activations and pooling count 0.

    Raises:
        NetworkError: the network does not take the example, or returns no logits.
    """
    inputs = distinct_rows(example_inputs, PROOF_ROWS)
    with taking_turns(net), evaluating(net), exact_float32():
        walk = _walk(net, inputs, logits)
        proofs: dict[str, _Proof] = {}
        closed: tuple[str, ...] = ()
        for name, _ in net.named_modules():
            if name not in walk.visits or name.startswith(closed):
                continue
            visit = walk.visits[name]
            proofs[name] = _prove(net, inputs, visit, walk, logits)
            if not proofs[name].why_not and visit.own_flops <= split_over * walk.flops:
                closed += (f"{name}.",)
    order = [name for name in walk.visits if name in proofs]
    return [walk.visits[name].site(proofs[name]) for name in order]


def probe_sites(
    net: nn.Module, example_inputs: Any, names: Iterable[str], *, logits: LogitsOf | None = None
) -> list[Site]:
    """``probe`` for given submodules only, in the order in which they are computed."""
    inputs = distinct_rows(example_inputs, PROOF_ROWS)
    sites = []
    with taking_turns(net), evaluating(net), exact_float32():
        walk = _walk(net, inputs, logits)
        for name in names:
            submodule(net, name)
            if name not in walk.visits:
                raise IllegalTap(f"'{name}' is not called in a forward of this network.")
            visit = walk.visits[name]
            sites.append(visit.site(_prove(net, inputs, visit, walk, logits)))
        order = list(walk.visits)
    return sorted(sites, key=lambda site: order.index(site.name))


def modules_after(net: nn.Module, example_inputs: Any, name: str) -> tuple[str, ...]:
    """Submodules that a forward enters only after another one is done; outermost names only.

    One that is never entered stays: its parent may use its weights, as attention does those of its last layer.
    """
    entered: set[str] = set()
    with evaluating(net), watched(net, enter=lambda other, inputs: entered.add(other)):
        run_until(net, name, example_inputs)
        # A container that holds modules but is never called itself counts by what is in it.
        reached = {part for other in entered for part in _ancestors(other)}
        call(net, example_inputs)
    ran = {part for other in entered for part in _ancestors(other)}
    missed = [other for other, _ in net.named_modules() if other in ran - reached]
    return tuple(other for other in missed if other.rpartition(".")[0] in reached | {""})


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


class _Proof(NamedTuple):
    """The outcome of dropping rows at a submodule: empty ``why_not`` where that is legal."""

    why_not: str = ""
    row_inputs: tuple[RowInput, ...] = ()


@dataclass
class _Visit:
    name: str
    calls: int = 0
    own_flops: int = 0
    flops: int = 0
    entered: int = 0  # modules that were entered before this one was done
    params: int = 0
    shape: tuple[int, ...] = ()
    objection: str = ""
    overwritten: bool = False  # by a later layer that works in place

    def site(self, proof: _Proof) -> Site:
        return Site(self.name, self.shape, self.flops, not proof.why_not, proof.why_not, self.params, proof.row_inputs)


@dataclass
class _Walk:
    """One counted forward of the proof's four rows; ``visits`` in the order of completion."""

    visits: dict[str, _Visit] = field(default_factory=dict)
    flops: int = 0
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    has_row_inputs: bool = False  # some submodule takes more than one tensor with the samples as rows


def _walk(net: nn.Module, inputs: Any, logits: LogitsOf | None) -> _Walk:
    walk = _Walk()
    entered: dict[str, int] = {}

    def enter(name: str, module_inputs: Any) -> None:
        entered[name] = counter.get_total_flops()
        walk.has_row_inputs |= _num_row_tensors(module_inputs) > 1

    given: dict[str, tuple[Tensor, int]] = {}  # outputs, and how often each had been written to by then

    def leave(name: str, output: Any) -> None:
        visit = walk.visits.pop(name, None) or _Visit(name)
        visit.calls += 1
        visit.flops = counter.get_total_flops() // PROOF_ROWS
        visit.own_flops += visit.flops - entered[name] // PROOF_ROWS
        visit.entered = len(entered)
        tensor = first_tensor(output)
        visit.shape = tuple(tensor.shape[1:]) if tensor is not None else ()
        visit.objection = _objection(visit.calls, tensor)
        walk.visits[name] = visit
        if tensor is not None:
            given[name] = tensor, tensor._version

    with flop_counter() as counter, watched(net, enter, leave):
        walk.logits = example_logits(net, inputs, logits)
        walk.flops = counter.get_total_flops() // PROOF_ROWS
    for name, (tensor, version) in given.items():
        walk.visits[name].overwritten = tensor._version != version
    params = params_entered(net, list(entered))
    for visit in walk.visits.values():
        visit.params = params[visit.entered]
    return walk


def _num_row_tensors(values: Any) -> int:
    leaves = pytree.tree_leaves(values)
    return sum(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == PROOF_ROWS for leaf in leaves)


def params_entered(net: nn.Module, entered: list[str]) -> list[int]:
    """Parameters used when none, one, two … of some modules were entered.

    Those of the network itself, and of a module that is never entered, count with the nearest parent that is.
    """
    places = {"": 0} | {name: i + 1 for i, name in enumerate(entered)}
    first_use: dict[nn.Parameter, int] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        parents = reversed(["", *_ancestors(name)])
        place = next(places[parent] for parent in parents if parent in places)
        first_use[parameter] = min(place, first_use.get(parameter, place))
    added = [0] * len(places)
    for parameter, place in first_use.items():
        added[place] += parameter.numel()
    return list(accumulate(added))


def _objection(calls: int, tensor: Tensor | None) -> str:
    if calls > 1:
        return f"called {calls} times in one forward"
    if tensor is None:
        return "gives out no tensor"
    if tensor.ndim < 2 or len(tensor) != PROOF_ROWS:
        return f"its output of shape {tuple(tensor.shape)} does not have the {PROOF_ROWS} samples as rows"
    return ""


def _prove(net: nn.Module, inputs: Any, visit: _Visit, walk: _Walk, logits: LogitsOf | None) -> _Proof:
    """Whether an exit may sit at a submodule, and which row inputs that takes."""
    if visit.objection:
        return _Proof(visit.objection)
    rows = torch.tensor(KEPT_ROWS, device=walk.logits.device)
    try:
        with take_rows(net, visit.name, rows):
            found = find_logits(call(net, inputs), logits)
    except Exception as error:  # whatever a later layer raises when it still wants all rows
        row_inputs = _row_inputs(net, inputs, visit.name, rows, walk, logits)
        proof = _Proof(row_inputs=row_inputs) if row_inputs else _Proof(_wants_all(error))
    else:
        proof = _Proof(_compare(found, walk.logits, rows))
    if not proof.why_not and visit.overwritten:
        return _Proof("a later layer changes its output in place: take that layer instead")
    return proof


def _row_inputs(
    net: nn.Module, inputs: Any, name: str, rows: Tensor, walk: _Walk, logits: LogitsOf | None
) -> tuple[RowInput, ...]:
    """The inputs whose rows must be dropped too, proved to be enough; empty where there are none that are."""
    if not walk.has_row_inputs:
        return ()
    weights = {key: value.detach().requires_grad_() for key, value in net.named_parameters() if _differentiable(value)}
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    try:
        with torch.enable_grad(), find_row_inputs(net, name, rows, PROOF_ROWS) as found:
            functional_call(net, weights, args, kwargs)
        with take_rows(net, name, rows, found):
            kept = find_logits(call(net, inputs), logits)
    except Exception:  # whatever a later layer raises: what it misses is no row input
        return ()
    return () if _compare(kept, walk.logits, rows) else tuple(found)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wants_all(error: Exception) -> str:
    kept, all_rows = len(KEPT_ROWS), PROOF_ROWS
    return f"with {kept} of {all_rows} rows kept there, a later layer still wants {all_rows} ({first_line(error)})"


def _compare(found: Tensor, reference: Tensor, rows: Tensor) -> str:
    """The empty string where exactly the kept rows of the logits came out, else what came out."""
    if len(found) != len(rows):
        return f"with {len(rows)} of {len(reference)} rows kept there, {len(found)} rows of logits come out"
    # Other rows of the batch change a sum's order, never more; the samples themselves differ by far more.
    spread = (reference - reference.mean(0)).abs().max()
    if not (found - reference[rows]).abs().max() <= 1e-2 * spread + 1e-6 * reference.abs().max():
        return "the rows kept there come out changed: later layers mix the samples"
    return ""
