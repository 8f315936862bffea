"""The Shallow-Deep Network: a backbone that is never edited, taps on it, and an exit at each."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.errors import FileFormatError, NetworkError, ShallowDeepError
from shallowdeep.networks.calls import LogitsOf, call, find_logits, first_line
from shallowdeep.networks.costs import Costs
from shallowdeep.networks.cut import FinalHeadNetwork, TruncatedNetwork
from shallowdeep.networks.exits import build_head, head_config
from shallowdeep.networks.hub import WEIGHTS, find_weights, push_folder, write_card
from shallowdeep.networks.sites import Site
from shallowdeep.networks.taps import tapped
from shallowdeep.networks.zoo import NetworkSpec, rebuild_network, spec_of
from shallowdeep.storage import load_tensors, misfits, read_as, save_tensors, shown


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

    - input: whatever the backbone takes, as one argument (several inputs as a tuple or mapping), or as keywords
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

    def forward(self, x: Any = None, /, **inputs: Any) -> list[Tensor]:
        """Logits of every exit, the last being the backbone's own."""
        if inputs and x is not None:
            raise NetworkError(
                f"inputs are one argument, or keywords: got both, with {', '.join(inputs)}. Put them into one mapping."
            )
        x = inputs or x
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

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise NetworkError(
            "DataParallel's copies would share one set of hooks. Use DistributedDataParallel: "
            "torchrun --nproc-per-node N, or one device alone (CUDA_VISIBLE_DEVICES=0)."
        )

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
            dtype: store floating-point weights in this type, e.g. ``torch.float16``; ``None``: as they are. Tensors
                with values beyond its range stay as they are.
        """
        tensors = self.state_dict()
        if dtype is not None:
            tensors = {name: _in_dtype(tensor, dtype) for name, tensor in tensors.items()}
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
        trust_code: bool | str = False,
    ) -> ShallowDeepNetwork:
        """Read back what ``save`` wrote; nothing is unpickled, and no weights are fetched.

        Args:
            path: of the file.
            backbone: a network of the same architecture; not needed for one known by name.
            head: builds the heads where they were the user's own.
            final_head: the module that was given to ``attach`` under this name, if one was.
            logits: as for ``attach``.
            trust_code: let a file whose network is named ``package.module:function`` import and call that; a
                name: that one alone.

        Raises:
            FileFormatError: the file is truncated, foreign, or its weights do not fit the network.
            NetworkError: its network is built by code of its own, which is not trusted.
        """
        tensors, config = load_tensors(path, kind="sdn")
        try:
            if config["final_head"] and final_head is None:
                raise FileFormatError(
                    f"{path} was saved with a final head of its own. Pass it: load(path, final_head=…)."
                )
            placements = read_as(tuple[Placement, ...], config["placements"])
            costs, label_spaces = read_as(Costs, config["costs"]), read_as(dict[str, int], config["label_spaces"])
            _check_sizes(config, placements, costs, sum(tensor.numel() for tensor in tensors.values()))
            backbone = _named_network(config, path, trust_code) if backbone is None else backbone
            heads = [
                _rebuild_head(values, p.site, head, path) for values, p in zip(config["heads"], placements, strict=True)
            ]
        except ShallowDeepError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
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

    def save_pretrained(self, folder: str | os.PathLike[str], *, card_info: Mapping[str, Any] | None = None) -> None:
        """Write a folder for others: the file of ``save``, and a model card ``README.md``.

        Args:
            folder: made if it is not there; its two files are replaced.
            card_info: what the card shall say: ``data``, ``strategy``, ``accuracy`` per exit in [0, 1], ``split``
                of the accuracies, ``license``, ``datasets`` (ids on the hub), ``notes`` (Markdown).
        """
        write_card(self, Path(folder), card_info or {})
        self.save(Path(folder) / WEIGHTS)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> ShallowDeepNetwork:
        """Read what ``save_pretrained`` wrote, from a folder or a repository of the Hugging Face hub.

        Args:
            folder_or_id: a folder, or ``owner/name``.
            revision: branch, tag or commit of the repository.
            token: for a private one; ``None``: the stored one.
            cache_dir: where downloads are kept; ``None``: where the hub's client keeps them.
            local_files_only: fetch nothing.
            options: as for ``load``.
        """
        path = find_weights(
            folder_or_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return cls.load(path, **options)

    def push_to_hub(self, repository: str, *, card_info: Mapping[str, Any] | None = None, **options: Any) -> str:
        """Upload what ``save_pretrained`` writes to a repository of the Hugging Face hub, as one commit.

        Args:
            repository: ``owner/name``; made if it is not there.
            card_info: as for ``save_pretrained``.
            options: ``private``, ``token``, ``revision`` (the branch), ``commit_message``, ``create_pr``.

        Returns:
            Address of the commit.
        """
        return push_folder(self, repository, card_info or {}, **options)

    def extra_repr(self) -> str:
        """Taps and what each exit costs, shown when the network is printed."""
        shares = ", ".join(f"{tap}: {cost:.3f}" for tap, cost in zip(self.taps, self.costs.relative(), strict=False))
        return f"relative cost to each exit: {{{shares}, last: {self.costs.relative()[-1]:.3f}}}"


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    found = tensor.to(dtype)
    return found if torch.equal(found.isfinite(), tensor.isfinite()) else tensor


def _check_sizes(config: Mapping[str, Any], placements: Sequence[Placement], costs: Costs, num_weights: int) -> None:
    """Refuse sizes that disagree, before a network of a damaged size takes all memory."""
    num_outputs = sum(config["label_spaces"].values())
    network, heads = config["network"] or {}, config["heads"]
    wrong = [
        not all(number > 0 for number in config["label_spaces"].values()),
        not 0 < num_outputs <= num_weights,
        not (network.get("num_classes") or 0) <= num_weights,
        not len(heads) == len(placements) == costs.num_exits - 1,
        *(head["num_outputs"] != num_outputs for head in heads),
        *(head["shape"] != list(p.site.shape) for head, p in zip(heads, placements, strict=False)),
        *(min(p.site.shape, default=0) < 1 for p in placements),
    ]
    if any(wrong):
        raise ValueError("its sizes disagree")


def _named_network(config: Mapping[str, Any], path: object, trust_code: bool | str) -> nn.Module:
    if config["network"] is None:
        raise FileFormatError(
            f"{path} holds a network that is not known by name. Build it and pass it: load(path, backbone=net)."
        )
    options = dict(config["network"])
    name = options.pop("name")
    return rebuild_network(NetworkSpec(name, options), trust_code=trust_code is True or trust_code == name)


def _load_weights(sdn: ShallowDeepNetwork, tensors: Mapping[str, Tensor], path: object) -> None:
    # Looked at beforehand: PyTorch raises only after it has overwritten everything that fits.
    own = sdn.state_dict()
    wrong = misfits(own, tensors)
    if wrong:
        raise FileFormatError(
            f"the weights in {path} do not fit the network: {len(wrong)} names or shapes differ, "
            f"first {shown(wrong[0])}. Pass the backbone, heads and final head it was saved with."
        )
    _check_names(sdn, path)
    like = next((weight for weight in sdn.backbone.parameters() if weight.is_floating_point()), torch.empty(0))
    for head in sdn.exits:
        if any(weight.is_meta for weight in head.parameters()):
            head.to_empty(device=like.device).to(like.dtype)
    own = sdn.state_dict()
    own.update(tensors)  # with the versions that modules note beside their weights, which some ask for
    sdn.load_state_dict(own)


def _rebuild_head(
    config: dict[str, Any], site: Site, head: Callable[[Site, int], nn.Module] | None, path: object
) -> nn.Module:
    if head is not None:
        return head(site, config["num_outputs"])
    if config["kind"] == "custom":
        raise FileFormatError(f"{path} holds heads of your own. Pass what built them: load(path, head=…).")
    with torch.device("meta"):  # a damaged size takes no memory; the weights come from the file
        return build_head(config)


def _check_names(sdn: ShallowDeepNetwork, path: object) -> None:
    for placement in sdn.placements:
        inputs = [name for name, _ in placement.site.row_inputs]
        for name in (placement.site.name, *placement.unreached, *inputs):
            try:
                sdn.backbone.get_submodule(name)
            except AttributeError as error:
                raise FileFormatError(f"{path} does not fit the network: {first_line(error)}. Save it anew.") from None
