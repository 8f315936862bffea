"""The Shallow-Deep Network: a backbone that is never edited, taps on it, and an exit at each."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.errors import FileFormatError, NetworkError
from shallowdeep.networks.calls import LogitsOf, call, find_logits, first_line
from shallowdeep.networks.costs import Costs
from shallowdeep.networks.exits import build_head, head_config
from shallowdeep.networks.sites import Site
from shallowdeep.networks.taps import run_until, tapped
from shallowdeep.networks.zoo import load_network, spec_of
from shallowdeep.storage import load_tensors, save_tensors


@dataclass(frozen=True)
class Placement:
    """Where an exit was asked for, and where it sits.

    Attributes:
        asked: share of the backbone's FLOPs; ``None`` where the tap was given by name.
        got: share of the backbone's FLOPs at the site.
        site: the tapped submodule.
        unreached: submodules of the backbone that never run before the site is done.
    """

    asked: float | None
    got: float
    site: Site
    unreached: tuple[str, ...] = ()


class ShallowDeepNetwork(nn.Module):
    """A backbone with internal classifiers at its taps; build one with ``attach``.

    - input: whatever the backbone takes
    - output: a list with one logits tensor ``(n, outputs)`` per exit, the last being the backbone's own

    The backbone runs unchanged: features are read by forward hooks that exist only during a forward, or
    for as long as a ``tapped()`` context is open.

    Attributes:
        backbone: the network as it was given; its weights keep their own names.
        exits: the internal classifiers, one per tap.
        placements: where each sits.
        costs: FLOPs and parameters to each exit.
        final_head: turns the backbone's logits into the last exit's, or ``None``.
        label_spaces: name to number of outputs, in the order of the columns of every exit's logits.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: Sequence[nn.Module],
        placements: Sequence[Placement],
        costs: Costs,
        *,
        label_spaces: Mapping[str, int],
        final_head: nn.Module | None = None,
        logits: LogitsOf | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.exits = nn.ModuleList(exits)
        self.final_head = final_head
        self.placements = tuple(placements)
        self.costs = costs
        self.label_spaces = dict(label_spaces)
        self.frozen = False
        self._logits_of = logits
        self._features: dict[str, Tensor] | None = None
        self._inside: int | None = None

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the tapped submodules, shallow to deep."""
        return tuple(placement.site.name for placement in self.placements)

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own output included."""
        return len(self.exits) + 1

    @property
    def num_outputs(self) -> int:
        """Columns of every exit's logits."""
        return sum(self.label_spaces.values())

    def forward(self, x: Any) -> list[Tensor]:
        """Logits of every exit, the last being the backbone's own."""
        # A compiled graph is traced with the taps open, and a thread's identity is nothing to trace.
        if torch.compiler.is_compiling() or self._inside == threading.get_ident():
            return self._run(x)
        with self.tapped():
            return self._run(x)

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Keep the hooks on around a whole loop: cheaper, and what ``torch.compile`` needs.

        Threads take turns; a thread already inside enters freely.
        """
        if self._inside == threading.get_ident():
            yield
            return
        with tapped(self.backbone, self.taps) as features:
            self._features, self._inside = features, threading.get_ident()
            try:
                yield
            finally:
                self._features = self._inside = None

    def _run(self, x: Any) -> list[Tensor]:
        features = self._features
        if features is None:
            raise NetworkError("compile inside the context: `with sdn.tapped(): torch.compile(sdn)(x)`.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            last = self.run_backbone(x)
        tapped_features = [features.pop(name) for name in self.taps]
        return [*(head(h) for head, h in zip(self.exits, tapped_features, strict=True)), last]

    def run_backbone(self, x: Any) -> Tensor:
        """Logits of the last exit alone, without hooks and without the internal exits."""
        logits = find_logits(call(self.backbone, x), self._logits_of)
        return logits if self.final_head is None else self.final_head(logits)

    def freeze_backbone(self, frozen: bool = True) -> ShallowDeepNetwork:
        """Freeze the backbone and its final head: no gradients, and evaluation mode even under ``train()``.

        Without evaluation mode, batch-norm statistics move and dropout acts although no weight has a gradient,
        which changes the network one meant to keep. Unfreezing gives every weight of them its gradient back.
        """
        self.frozen = frozen
        for part in self._backbone_parts():
            part.requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> ShallowDeepNetwork:
        """Set training mode, of the exits alone where the backbone is frozen."""
        super().train(mode)
        if self.frozen:
            for part in self._backbone_parts():
                part.eval()
        return self

    def _backbone_parts(self) -> list[nn.Module]:
        return [self.backbone] if self.final_head is None else [self.backbone, self.final_head]

    def plain(self) -> nn.Module:
        """The backbone alone, a copy that shares nothing with this network."""
        return copy.deepcopy(self.backbone)

    def truncate(self, exit: int) -> nn.Module:
        """The network that ends at one exit, a copy without the modules that come after it.

        Args:
            exit: index of an exit; the last gives ``plain()``, followed by the final head where there is one.

        Returns:
            A module from the backbone's inputs to that exit's logits ``(n, outputs)``.
        """
        if not 0 <= exit < self.num_exits:
            raise NetworkError(f"no exit {exit}: this network has exits 0 to {self.num_exits - 1}.")
        if exit == self.num_exits - 1:
            if self.final_head is None:
                return self.plain()
            return FinalHeadNetwork(self.plain(), copy.deepcopy(self.final_head), self._logits_of)
        head, unreached = copy.deepcopy(self.exits[exit]), self.placements[exit].unreached
        return TruncatedNetwork(self.plain(), self.taps[exit], head, unreached)

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write weights, taps, costs and configuration as one safetensors file.

        Args:
            path: where to; replaced when it exists.
            dtype: store floating-point weights in this type, e.g. ``torch.float16``; ``None``: as they are.
        """
        tensors = self.state_dict()
        if dtype is not None:
            tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        save_tensors(path, tensors, kind="sdn", info=self._config())

    def _config(self) -> dict[str, Any]:
        spec = spec_of(self.backbone)
        return {
            "network": None if spec is None else {"name": spec.name, **spec.options},
            "placements": [asdict(p) for p in self.placements],
            "heads": [
                head_config(head, p.site.shape, self.num_outputs)
                for head, p in zip(self.exits, self.placements, strict=True)
            ],
            "costs": self.costs.to_dict(),
            "label_spaces": self.label_spaces,
            "final_head": self.final_head is not None,
        }

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backbone: nn.Module | None = None,
        *,
        head: Callable[[Site, int], nn.Module] | None = None,
        final_head: nn.Module | None = None,
        logits: LogitsOf | None = None,
    ) -> ShallowDeepNetwork:
        """Read back what ``save`` wrote; nothing is unpickled.

        Args:
            path: of the file.
            backbone: a network of the same architecture; not needed for one known by name.
            head: builds the heads where they were the user's own.
            final_head: the module that was given to ``attach`` under this name, if one was.
            logits: as for ``attach``.

        Raises:
            FileFormatError: the file is truncated, foreign, or its weights do not fit the network.
        """
        tensors, config = load_tensors(path, kind="sdn")
        try:
            backbone = _named_network(config, path) if backbone is None else backbone
            if config["final_head"] and final_head is None:
                raise FileFormatError(
                    f"{path} was saved with a final head of its own. Pass it: load(path, final_head=…)."
                )
            placements = [_placement(values) for values in config["placements"]]
            heads = [
                _rebuild_head(values, p.site, head, path) for values, p in zip(config["heads"], placements, strict=True)
            ]
            costs, label_spaces = Costs.from_dict(config["costs"]), config["label_spaces"]
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{path} describes no Shallow-Deep Network ({first_line(error)}). Save it anew."
            ) from error
        sdn = cls(
            backbone,
            heads,
            placements,
            costs,
            label_spaces=label_spaces,
            final_head=final_head,
            logits=logits,
        )
        _load_weights(sdn, tensors, path)
        return sdn

    def extra_repr(self) -> str:
        """Taps and what each exit costs, shown when the network is printed."""
        shares = ", ".join(f"{tap}: {cost:.3f}" for tap, cost in zip(self.taps, self.costs.relative(), strict=False))
        return f"relative cost to each exit: {{{shares}, last: {self.costs.relative()[-1]:.3f}}}"


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


def _placement(values: Mapping[str, Any]) -> Placement:
    site = Site(**{**values["site"], "shape": tuple(values["site"]["shape"])})
    return Placement(values["asked"], values["got"], site, tuple(values["unreached"]))


def _named_network(config: Mapping[str, Any], path: object) -> nn.Module:
    if config["network"] is None:
        raise FileFormatError(
            f"{path} holds a network that is not known by name. Build it and pass it: load(path, backbone=net)."
        )
    return load_network(**config["network"])


def _load_weights(sdn: nn.Module, tensors: Mapping[str, Tensor], path: object) -> None:
    # Looked at beforehand: PyTorch raises only after it has overwritten everything that fits.
    own = sdn.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise FileFormatError(
            f"the weights in {path} do not fit the network: {len(wrong)} names or shapes differ, first '{wrong[0]}'. "
            "Pass the backbone, heads and final head it was saved with."
        )
    sdn.load_state_dict(tensors)


def _rebuild_head(
    config: dict[str, Any], site: Site, head: Callable[[Site, int], nn.Module] | None, path: object
) -> nn.Module:
    if head is not None:
        return head(site, config["num_outputs"])
    if config["kind"] == "custom":
        raise FileFormatError(f"{path} holds heads of your own. Pass what built them: load(path, head=…).")
    return build_head(config)
