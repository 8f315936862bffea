"""Turning a network into a Shallow-Deep Network: choose the taps, build the exits, count what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shallowdeep.errors import IllegalTap, NetworkError
from shallowdeep.networks.calls import LogitsOf, batch_size, evaluating, example_logits
from shallowdeep.networks.costs import Costs, count_flops, count_params
from shallowdeep.networks.exits import default_head, first_token_head
from shallowdeep.networks.sdn import Placement, ShallowDeepNetwork
from shallowdeep.networks.sites import Site, modules_after, probe, probe_sites

SHARES = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)
"""Where the paper asks for exits: shares of the backbone's computation."""


def attach(
    net: nn.Module,
    example_inputs: Any,
    *,
    shares: Sequence[float] = SHARES,
    taps: Sequence[str] | None = None,
    head: Callable[[Site, int], nn.Module] | None = None,
    label_spaces: Mapping[str, int] | None = None,
    final_head: nn.Module | None = None,
    logits: LogitsOf | None = None,
) -> ShallowDeepNetwork:
    """Put internal classifiers on any network, without editing it.

    Args:
        net: the backbone; used as it is, not copied. Attach before ``torch.compile`` or DDP.
        example_inputs: what the network takes, of any batch size; only shapes and types matter.
        shares: of the backbone's FLOPs; an exit sits at the nearest legal site to each, and at the last
            of several sites of equal FLOPs.
        taps: names of submodules instead of shares, shallow to deep; empty: no internal exit.
        head: builds a classifier for a site; it maps that site's features to ``num_outputs`` logits. ``None``:
            ``default_head``; for inputs with an ``attention_mask``, which may be padded, ``first_token_head``.
        label_spaces: name to number of outputs where exits answer in several label sets; they are column
            blocks of one logits tensor. ``None``: one set, as large as the backbone's output.
        final_head: maps the backbone's logits to all columns of the last exit, where there are more than
            the backbone gives.
        logits: takes the logits out of what the network returns, or names them in it, where that is not obvious.

    Returns:
        The Shallow-Deep Network; its ``placements`` say what was asked for and what was got.

    Raises:
        IllegalTap: a tap is no legal site, or there are fewer legal sites than shares.
        NetworkError: the network is compiled or wrapped, or does not take the example.

    Cite: Kaya, Hong & Dumitras, ICML 2019, section 4.
    """
    _refuse_wrapped(net)
    with evaluating(net):
        last = example_logits(net, example_inputs, logits)
    flops, params = total_flops(net, example_inputs), count_params(net)
    if taps is None:
        found = choose_sites(probe(net, example_inputs, logits=logits), shares, flops)
        asked: Sequence[float | None] = sorted(shares)
    else:
        found = _legal_sites(net, example_inputs, taps, logits)
        asked = [None] * len(taps)
    spaces = dict(label_spaces or {"labels": last.shape[1]})
    num_outputs = sum(spaces.values())
    _check_width(last, spaces, final_head)
    if head is None:
        padded = isinstance(example_inputs, Mapping) and "attention_mask" in example_inputs
        head = first_token_head if padded else default_head
    exits = [head(site, num_outputs).to(last) for site in found]  # its device and number type
    placements = [
        Placement(share, site.flops / flops, site, modules_after(net, example_inputs, site.name))
        for share, site in zip(asked, found, strict=True)
    ]
    return ShallowDeepNetwork(
        net,
        exits,
        placements,
        _costs(found, exits, asked, flops, params, last, final_head),
        label_spaces=spaces,
        final_head=final_head,
        logits=logits,
    )


def choose_sites(sites: Sequence[Site], shares: Sequence[float], flops: int) -> list[Site]:
    """The legal sites nearest to given shares of the backbone's FLOPs, one each, shallow to deep.

    Args:
        sites: from ``probe``, in the order in which they are computed.
        shares: each in (0, 1), any order.
        flops: of the whole backbone.

    Raises:
        IllegalTap: there are fewer distinct legal sites than shares, or a share is no share.
    """
    if not all(0 < share < 1 for share in shares) or len(set(shares)) != len(shares):
        raise IllegalTap(f"shares are distinct fractions of the network between 0 and 1, got {tuple(shares)}.")
    # At equal FLOPs the last site wins: after the pooling, the activation, the end of the block.
    candidates = {site.flops: site for site in sites if site.legal and 0 < site.flops < flops}
    if len(candidates) < len(shares):
        raise IllegalTap(
            f"{len(shares)} exits were asked for, but this network has {len(candidates)} legal sites with "
            f"distinct costs: {', '.join(site.name for site in candidates.values()) or 'none'}. "
            "Ask for fewer shares (fit --set 'shares=[0.3,0.6]'), or look deeper (probe(net, inputs, split_over=0) or "
            "probe --everywhere) and pass taps=."
        )
    chosen: list[Site] = []
    depths = sorted(candidates)
    for i, share in enumerate(sorted(shares)):
        # Every later share needs a deeper site of its own.
        first = depths.index(chosen[-1].flops) + 1 if chosen else 0
        free = depths[first : len(depths) - (len(shares) - i - 1)]
        chosen.append(candidates[min(free, key=lambda depth: abs(depth / flops - share))])
    return chosen


def total_flops(net: nn.Module, example_inputs: Any) -> int:
    """FLOPs of the whole backbone for one sample, 2 per multiply-add."""
    return count_flops(net, example_inputs) // batch_size(example_inputs)


def _legal_sites(net: nn.Module, example_inputs: Any, taps: Sequence[str], logits: LogitsOf | None) -> list[Site]:
    if len(set(taps)) != len(taps):
        raise IllegalTap(f"taps must differ from each other, got {tuple(taps)}.")
    sites = probe_sites(net, example_inputs, taps, logits=logits)
    for site in sites:
        if not site.legal:
            legal = [s for s in probe(net, example_inputs, logits=logits) if s.legal]
            nearby = sorted(legal, key=lambda s: abs(s.flops - site.flops))[:3]
            raise IllegalTap(
                f"no exit can sit at '{site.name}': {site.why_not}. "
                f"Legal taps nearby: {', '.join(s.name for s in nearby) or 'none'}."
            )
    if [site.name for site in sites] != list(taps):
        raise IllegalTap(f"taps must be given from shallow to deep, got {tuple(taps)}.")
    return sites


def _costs(
    sites: Sequence[Site],
    exits: Sequence[nn.Module],
    asked: Sequence[float | None],
    flops: int,
    params: int,
    last: torch.Tensor,
    final_head: nn.Module | None,
) -> Costs:
    features = [last.new_zeros((1, *site.shape)) for site in sites]
    final = (0, 0) if final_head is None else (count_flops(final_head, last[:1]), count_params(final_head))
    nominal = [share for share in asked if share is not None]
    return Costs(
        backbone_flops=(*(site.flops for site in sites), flops),
        head_flops=(*(count_flops(head, x) for head, x in zip(exits, features, strict=True)), final[0]),
        backbone_params=(*(site.params for site in sites), params),
        head_params=(*(count_params(head) for head in exits), final[1]),
        nominal=(*nominal, 1.0) if len(nominal) == len(sites) else None,
    )


def _check_width(last: torch.Tensor, spaces: Mapping[str, int], final_head: nn.Module | None) -> None:
    if final_head is not None:
        with evaluating(final_head):
            last = final_head(last)
    if last.shape[1] != sum(spaces.values()):
        raise NetworkError(
            f"the last exit gives {last.shape[1]} logits, the label spaces {dict(spaces)} need {sum(spaces.values())}. "
            "Pass final_head=, a module from the backbone's logits to all of them."
        )


def _refuse_wrapped(net: nn.Module) -> None:
    if hasattr(net, "_orig_mod") or net._compiled_call_impl is not None:
        raise NetworkError(
            "this network is compiled, and hooks put on now would be ignored: attach first, then compile."
        )
    if isinstance(net, DataParallel | DistributedDataParallel):
        raise NetworkError(f"this network is wrapped in {type(net).__name__}: attach first, then wrap.")
