"""Where an exit looks: Grad-CAM and guided Grad-CAM of any exit, and a gradient map for networks of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shallowdeep.data.pytrees import map_tensors, row_counts, take_rows
from shallowdeep.errors import ConfigError, NetworkError
from shallowdeep.networks.calls import evaluating, exact_float32
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import first_tensor, replaced, tapped, watched
from shallowdeep.progress import track

MOST_OTHER_TOKENS = 8  # class, distillation and register tokens


@dataclass(frozen=True)
class Saliency:
    """What an exit looked at for a class.

    Attributes:
        maps: of images ``(n, height, width)``, of token sequences ``(n, tokens)``; in [0, 1], 0 everywhere where
            nothing speaks for the class.
        classes: that the maps are of, shape ``(n,)``.
        exit: whose answer is explained.
        site: the submodule whose features the map is made of.
        guided: guided Grad-CAM ``(n, channels, height, width)``, with its signs; ``None`` where it was not asked for.
    """

    maps: Float[Tensor, "n ..."]
    classes: Int[Tensor, " n"]
    exit: int
    site: str
    guided: Float[Tensor, "n c h w"] | None = None


def gradcam(
    sdn: ShallowDeepNetwork,
    inputs: Any,
    *,
    exit: int = -1,
    classes: Int[Tensor, " n"] | None = None,
    site: str | None = None,
    guided: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Saliency:
    """What an exit of a network looks at.

    Where the exit reads feature maps, Grad-CAM: the maps of a site, weighted by the mean gradient of the class's
    logit; what speaks for the class is kept, enlarged to the image and stretched to [0, 1]. Where it reads tokens:
    gradient times activation of each embedded token; of an image's patches, drawn over the image.

    The network is left as it was: its mode, ``requires_grad`` and ``.grad`` of every weight, also when it is frozen.

    Args:
        sdn: the network, on any device.
        inputs: what the backbone takes, samples as rows.
        exit: whose answer is explained; -1: the last exit's.
        classes: to explain, shape ``(n,)``; ``None``: what that exit answers.
        site: submodule whose features are looked at. ``None``: the exit's own tap; of the last exit, the last
            feature map larger than one pixel (with tokens, the first sequence of the deepest tap's shape).
        guided: also guided Grad-CAM: the gradient of the class's logit with respect to the image, let through every
            ReLU and ReLU6 only where it is positive, times the map. Only images have it, in networks with such.
        batch_size: samples at a time.
        progress: draw a bar on the terminal.

    Raises:
        NetworkError: there is no such exit or submodule, no feature map or tokens to look at, or the class does not
            depend on the site's features.
        ConfigError: there are no samples, or classes are not one per sample or not among the outputs.

    Cite: Selvaraju et al., ICCV 2017 (Grad-CAM); Springenberg et al., ICLR 2015 (guided backpropagation). Kaya, Hong &
    Dumitras, ICML 2019, show the first exit's and the last one's.
    Deviation: the authors' guided maps are plain gradients, for their replacement of the ReLUs has no effect.
    """
    if not -sdn.num_exits <= exit < sdn.num_exits:
        raise NetworkError(f"no exit {exit}: this network has exits 0 to {sdn.num_exits - 1}.")
    exit %= sdn.num_exits
    number = _count(inputs, classes, sdn.num_outputs)
    if batch_size < 1:
        raise ConfigError(f"a batch has one sample at least, got batch_size={batch_size}.")
    device = next(sdn.parameters()).device
    starts = track(range(0, number, batch_size), -(-number // batch_size), f"Grad-CAM exit {exit}", shown=progress)
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    with evaluating(sdn), exact_float32():
        look = _Look(sdn, exit, *_find_site(sdn, take_rows(inputs, slice(0, 1)), exit, site, device))
        for start in starts:
            rows = slice(start, start + batch_size)
            parts.append(
                look.at(_on(take_rows(inputs, rows), device), None if classes is None else classes[rows], guided)
            )
    maps, found, signed = zip(*parts, strict=True)
    return Saliency(
        torch.cat(maps),
        torch.cat(found),
        exit,
        look.site,
        torch.cat([x for x in signed if x is not None]) if guided else None,
    )


@dataclass(frozen=True)
class _Look:
    """One exit seen from one site."""

    sdn: ShallowDeepNetwork
    exit: int
    site: str
    tokens: bool

    def at(self, inputs: Any, classes: Tensor | None, guided: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Maps, their classes and, if asked, guided maps, of a batch, on the CPU."""
        with tapped(self.sdn.backbone, [self.site]) as found:
            self.sdn.run_backbone(inputs)
        features = found[self.site].detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(inputs, features)
            chosen = logits.argmax(1) if classes is None else classes.to(logits.device)
            wanted = logits.gather(1, chosen[:, None]).sum()
        gradient = _gradient(wanted, features, f"exit {self.exit}'s answer does not depend on '{self.site}'")
        image = inputs if isinstance(inputs, Tensor) and inputs.ndim == 4 else None
        if not self.tokens and any(getattr(head, "channels_last", False) for head in self.sdn.exits):
            features, gradient = features.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)  # as Swin gives them
        maps = _of_tokens(features, gradient, image) if self.tokens else _of_maps(features, gradient, image)
        signed = None
        if guided:
            if image is None or not image.is_floating_point():
                raise NetworkError(
                    "guided Grad-CAM is of images: give a floating-point tensor (n, channels, height, width)."
                )
            signed = self._guided(image, chosen) * maps[:, None]
        return maps.detach().cpu(), chosen.cpu(), None if signed is None else signed.detach().cpu()

    def _logits(self, inputs: Any, features: Tensor) -> Tensor:
        sdn, exit = self.sdn, self.exit
        internal = exit < len(sdn.exits)
        if internal and sdn.taps[exit] == self.site:
            return sdn.exits[exit](features)
        # a copy, which a later layer may change in place
        with replaced(sdn.backbone, self.site, features.clone()), tapped(sdn.backbone, sdn.taps) as found:
            last = sdn.run_backbone(inputs)
        return sdn.exits[exit](found[sdn.taps[exit]]) if internal else last

    def _guided(self, image: Tensor, classes: Tensor) -> Tensor:
        seen = image.detach().clone().requires_grad_()
        with torch.enable_grad(), _GuidedReLUs() as relus:
            with tapped(self.sdn.backbone, self.sdn.taps) as found:
                last = self.sdn.run_backbone(seen * 1.0)
            internal = self.exit < len(self.sdn.exits)
            logits = self.sdn.exits[self.exit](found[self.sdn.taps[self.exit]]) if internal else last
            wanted = logits.gather(1, classes[:, None]).sum()
        if not relus.met:
            raise NetworkError("guided Grad-CAM needs ReLUs, and this network has none. Leave guided out.")
        return _gradient(wanted, seen, f"exit {self.exit}'s answer does not depend on the image")


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < most))
        return x.clamp(0, most)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (open_,) = ctx.saved_tensors
        return gradient.clamp(min=0) * open_, None


class _GuidedReLUs(TorchFunctionMode):
    """Inside, every ReLU lets positive gradients alone through, be it a module, a function or in place."""

    RELUS = frozenset({torch.relu, torch.relu_, F.relu, F.relu_, Tensor.relu, Tensor.relu_})

    def __init__(self) -> None:
        super().__init__()
        self.met = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        most = self._most(func, args, kwargs)
        if most is None:
            return func(*args, **kwargs)
        self.met += 1
        return _GuidedReLU.apply(args[0] if args else kwargs["input"], most)

    def _most(self, func: Callable[..., Any], args: Any, kwargs: Any) -> float | None:
        """The largest value a ReLU lets through; ``None``: it is no ReLU."""
        if func in self.RELUS:
            return math.inf
        if func is F.relu6:
            return 6.0
        if func is not F.hardtanh:  # what the module ReLU6 calls
            return None
        low, high = (
            kwargs.get(name, args[i] if len(args) > i else None) for i, name in ((1, "min_val"), (2, "max_val"))
        )
        return high if low == 0 else None


def _of_maps(features: Tensor, gradient: Tensor, image: Tensor | None) -> Tensor:
    """Grad-CAM, of maps ``(n, c, h, w)``."""
    maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    return _stretched(_enlarged(maps, image))


def _of_tokens(features: Tensor, gradient: Tensor, image: Tensor | None) -> Tensor:
    """Gradient times activation of each token; over an image where the tokens are its patches."""
    spoken = (gradient * features).sum(-1).relu()
    if image is None:
        return _stretched(spoken)
    rows, columns = _grid(spoken.shape[1], *image.shape[2:])
    return _stretched(_enlarged(spoken[:, -rows * columns :].unflatten(1, (rows, columns)), image))


def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of an image's patches; a few tokens that are none, such as the class token, stand first."""
    sides = range(1, min(height, width) + 1)
    whole = [side for side in sides if height % side == width % side == 0]
    grids = [(height // side, width // side) for side in (*whole, *sides)]
    fitting = [(rows, columns) for rows, columns in grids if 0 <= tokens - rows * columns <= MOST_OTHER_TOKENS]
    if not fitting:
        raise NetworkError(
            f"{tokens} tokens are no grid of square patches over {height} x {width} pixels. "
            "Name a site with feature maps (site=…)."
        )
    return fitting[0]


def _enlarged(maps: Tensor, image: Tensor | None) -> Tensor:
    if image is None:
        return maps
    return F.interpolate(maps[:, None], size=image.shape[2:], mode="bicubic", align_corners=False)[:, 0].clamp(min=0)


def _stretched(maps: Tensor) -> Tensor:
    """Each sample's map to [0, 1]; one without differences becomes 0."""
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    room = torch.where(high > low, high - low, torch.ones_like(high))
    return ((flat - low) / room).view_as(maps)


def _gradient(wanted: Tensor, to: Tensor, problem: str) -> Tensor:
    found = torch.autograd.grad(wanted, to, allow_unused=True)[0] if wanted.requires_grad else None
    if found is None:
        raise NetworkError(f"{problem}. Name another site.")
    return found


def _find_site(
    sdn: ShallowDeepNetwork, example: Any, exit: int, site: str | None, device: torch.device
) -> tuple[str, bool]:
    """The submodule to look at, and whether its features are tokens."""
    shapes = _shapes(sdn, _on(example, device))
    tap = sdn.taps[exit] if exit < len(sdn.exits) else None
    if site is not None:
        if site not in shapes:
            raise NetworkError(f"'{site}' is no submodule that gives out floating-point features.")
        return site, _is_sequence(shapes[site], site)
    if tap is not None and _is_map(shapes[tap]):
        return tap, False
    deepest = tap or (sdn.taps[-1] if sdn.taps else None)
    if deepest is not None and len(shapes[deepest]) == 3:
        return next(name for name, shape in shapes.items() if shape == shapes[deepest]), True
    names = list(shapes)
    until = names if tap is None else names[: names.index(tap) + 1]
    maps = [name for name in until if _is_map(shapes[name])]
    if not maps:
        raise NetworkError(f"exit {exit} reads no feature map and no tokens. Name a submodule that gives some: site=…")
    return maps[-1], False


def _shapes(sdn: ShallowDeepNetwork, example: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of what submodules give out, in the order in which they are done."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None and tensor.is_floating_point() and tensor.ndim > 1:
            shapes.pop(name, None)
            shapes[name] = tuple(tensor.shape)

    with watched(sdn.backbone, leave=note):
        sdn.run_backbone(example)
    return shapes


def _is_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and min(shape[2:]) > 1


def _is_sequence(shape: tuple[int, ...], site: str) -> bool:
    if len(shape) not in (3, 4):
        raise NetworkError(
            f"'{site}' gives out features of shape {shape[1:]}, neither maps (c, h, w) nor tokens (t, d)."
        )
    return len(shape) == 3


def _count(inputs: Any, classes: Tensor | None, num_outputs: int) -> int:
    counts = row_counts(inputs)
    if len(counts) != 1 or 0 in counts:
        raise ConfigError(f"inputs have {sorted(counts)} rows. Give one sample at least, as rows of every tensor.")
    number = counts.pop()
    if classes is not None and (classes.shape != (number,) or classes.min() < 0 or classes.max() >= num_outputs):
        raise ConfigError(
            f"classes are of shape {tuple(classes.shape)} for {number} samples and {num_outputs} outputs. "
            f"Give one for each sample, from 0 to {num_outputs - 1}."
        )
    return number


def _on(inputs: Any, device: torch.device) -> Any:
    return map_tensors(lambda tensor: tensor.to(device), inputs)
