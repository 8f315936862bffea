"""Internal classifiers: small heads that turn the features at a tap into logits."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shallowdeep.errors import NetworkError
from shallowdeep.networks.sites import Site

POOLED_SIDE = 4


class MixedPool(nn.Module):
    """Feature reduction of the paper: a learned mix of max and average pooling, down to at most 4×4.

    ``mix * max + (1 - mix) * avg`` with one learned scalar, drawn from [0, 1) and free afterwards: neither
    clamped nor squashed. Sides up to 4 are kept as they are (at 4 the mix exists, as in the paper, but has no effect).

    - input ``(n, channels, height, width)``
    - output ``(n, channels, min(height, 4), min(width, 4))``

    Deviation: sides that 4 does not divide are pooled to 4 with overlapping windows (stride ``side // 4``);
    the authors' code leaves a side of 7 at 7.
    Cite: Kaya, Hong & Dumitras, ICML 2019, section 4; the mix is Lee, Gallagher & Tu, AISTATS 2016.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        self.kernel = (_window(height)[0], _window(width)[0])
        self.stride = (_window(height)[1], _window(width)[1])
        self.pools = max(height, width) >= POOLED_SIDE
        if self.pools:
            self.mix = nn.Parameter(torch.rand(()))

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """Pool a map."""
        if not self.pools:
            return features
        largest = F.max_pool2d(features, self.kernel, self.stride)
        average = F.avg_pool2d(features, self.kernel, self.stride)
        return self.mix * largest + (1 - self.mix) * average

    def both(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m c h2 w2"]:
        """What is mixed: the maximum and the average map; one map where they are the same, in sides up to 4."""
        if self.kernel == (1, 1):
            return features.unsqueeze(1)
        pools = (F.max_pool2d, F.avg_pool2d)
        return torch.stack([pool(features, self.kernel, self.stride) for pool in pools], dim=1)

    def mixed(self, both: Float[Tensor, "n m c h2 w2"]) -> Float[Tensor, "n c h2 w2"]:
        """``forward`` from what ``both`` gave."""
        return self.mix * both[:, 0] + (1 - self.mix) * both[:, -1] if self.pools else both[:, 0]


def _window(side: int) -> tuple[int, int]:
    if side <= POOLED_SIDE:
        return 1, 1
    stride = side // POOLED_SIDE
    return side - (POOLED_SIDE - 1) * stride, stride


class InternalClassifier(nn.Module):
    """The paper's internal classifier for feature maps: mixed pooling, then one linear layer.

    - input ``(n, channels, height, width)``, or ``(n, height, width, channels)``
    - output ``(n, num_outputs)``

    Args:
        shape: of one sample, in the order of the input.
        num_outputs: classes.
        channels_last: the order of the input, as Swin's blocks give it out.

    Cite: Kaya, Hong & Dumitras, ICML 2019, section 4.
    """

    def __init__(self, shape: tuple[int, int, int], num_outputs: int, channels_last: bool = False):
        super().__init__()
        self.channels_last = channels_last
        channels, height, width = (shape[2], *shape[:2]) if channels_last else shape
        self.pool = MixedPool(height, width)
        sides = min(height, POOLED_SIDE), min(width, POOLED_SIDE)
        self.linear = nn.Linear(channels * sides[0] * sides[1], num_outputs)

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits of a feature map."""
        if self.channels_last:
            features = features.permute(0, 3, 1, 2)
        return self.linear(self.pool(features).flatten(1))

    def reduced(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m _ _ _"]:
        """The maximum and average maps: all that the learned part sees of a feature map."""
        return self.pool.both(features.permute(0, 3, 1, 2) if self.channels_last else features)

    def from_reduced(self, reduced: Float[Tensor, "n m _ _ _"]) -> Float[Tensor, "n k"]:
        """``forward`` from what ``reduced`` gave."""
        return self.linear(self.pool.mixed(reduced).flatten(1))


class TokenClassifier(nn.Module):
    """A head for token sequences: one token or the mean of all, normalised, then one linear layer.

    - input ``(n, tokens, width)``
    - output ``(n, num_outputs)``

    Args:
        shape: ``(tokens, width)`` of one sample.
        num_outputs: classes.
        pool: ``"mean"`` of all tokens, or ``"first"``: the ``[CLS]`` token.
    """

    def __init__(self, shape: tuple[int, int], num_outputs: int, pool: str = "mean"):
        super().__init__()
        if pool not in ("mean", "first"):
            raise NetworkError(f"a token head pools by 'mean' or 'first', got {pool!r}.")
        self.pool = pool
        # Between the blocks of a pre-norm transformer the residual stream has no fixed scale.
        self.norm = nn.LayerNorm(shape[-1])
        self.linear = nn.Linear(shape[-1], num_outputs)

    def forward(self, features: Float[Tensor, "n t d"]) -> Float[Tensor, "n k"]:
        """Logits of a token sequence."""
        return self.from_reduced(self.reduced(features))

    def reduced(self, features: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
        """The one token, or the mean of all, that the learned part sees."""
        return features[:, 0] if self.pool == "first" else features.mean(1)

    def from_reduced(self, reduced: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """``forward`` from what ``reduced`` gave."""
        return self.linear(self.norm(reduced))


class VectorClassifier(nn.Module):
    """A head for feature vectors: one linear layer, ``(n, width)`` to ``(n, num_outputs)``."""

    def __init__(self, shape: tuple[int], num_outputs: int):
        super().__init__()
        self.linear = nn.Linear(shape[0], num_outputs)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Logits of a vector."""
        return self.linear(features)


@runtime_checkable
class ReducingHead(Protocol):
    """A head whose learned part sees less than the features: ``forward(x)`` is ``from_reduced(reduced(x))``.

    ``reduced`` has no weights. A frozen backbone's features can then be kept small; see ``FeatureReuse``.
    """

    def reduced(self, features: Any) -> Tensor:
        """What the learned part sees, rows first."""
        ...

    def from_reduced(self, reduced: Tensor) -> Tensor:
        """Logits ``(n, outputs)``."""
        ...


HEADS: dict[str, type[nn.Module]] = {
    "map": InternalClassifier,
    "tokens": TokenClassifier,
    "vector": VectorClassifier,
}
"""Heads that a checkpoint can name, by the number of dimensions they are for (3, 2, 1)."""


def default_head(site: Site, num_outputs: int) -> nn.Module:
    """The head that fits a site's features: maps ``(c, h, w)``, tokens ``(t, d)`` or vectors ``(d,)``.

    Maps whose first two sides are equal and the third is another are taken for ``(h, w, c)``.

    Raises:
        NetworkError: the features have another number of dimensions.
    """
    kind = {3: "map", 2: "tokens", 1: "vector"}.get(len(site.shape))
    if kind is None:
        raise NetworkError(
            f"no default head for features of shape {site.shape} at '{site.name}'. "
            "Pass head=, a function (site, num_outputs) -> module."
        )
    if kind == "map":
        first, second, third = site.shape
        return InternalClassifier((first, second, third), num_outputs, channels_last=first == second != third)
    return HEADS[kind](site.shape, num_outputs)


def first_token_head(site: Site, num_outputs: int) -> nn.Module:
    """``default_head``, but for a token sequence the head that reads its first token alone: the ``[CLS]`` token.

    What ``attach`` takes for padded sequences (inputs with an attention mask): the mean of all tokens would be that
    of the padding too. In a causal network the first token has seen no other: pass a head of your own there.
    """
    if len(site.shape) == 2:
        return TokenClassifier(site.shape, num_outputs, pool="first")
    return default_head(site, num_outputs)


def head_config(head: nn.Module, shape: tuple[int, ...], num_outputs: int) -> dict[str, Any]:
    """What a checkpoint needs to build a head again; ``kind`` is ``"custom"`` for a head of the user's."""
    kind = next((name for name, cls in HEADS.items() if type(head) is cls), "custom")
    config: dict[str, Any] = {"kind": kind, "shape": list(shape), "num_outputs": num_outputs}
    if isinstance(head, TokenClassifier):
        config["pool"] = head.pool
    if isinstance(head, InternalClassifier) and head.channels_last:
        config["channels_last"] = True
    return config


def build_head(config: dict[str, Any]) -> nn.Module:
    """Build a head from ``head_config``'s description."""
    options = {key: value for key, value in config.items() if key not in ("kind", "shape", "num_outputs")}
    return HEADS[config["kind"]](tuple(config["shape"]), config["num_outputs"], **options)
