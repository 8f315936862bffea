"""What a named network takes: how its images are prepared, and an example of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.errors import NetworkError
from shallowdeep.networks.zoo import spec_of

NUM_TOKENS = 16


def preprocessing_of(net: nn.Module) -> Preprocessing | None:
    """How images are prepared for a network that ``load_network`` built, as its library says.

    Returns:
        ``None`` where nothing is known, or the library prepares them in a way of its own.
    """
    return getattr(net, "shallowdeep_preprocessing", None)


def example_inputs_for(net: nn.Module) -> Tensor | dict[str, Tensor]:
    """One example of what a network takes: for ``probe`` and ``attach``, which look at shapes and types alone.

    Args:
        net: from ``load_network``, or any image or text network of timm or transformers.

    Returns:
        An image ``(1, channels, side, side)`` of zeros; for text ``input_ids`` and ``attention_mask``, each
        ``(1, 16)``, with tokens that all differ.

    Raises:
        NetworkError: nothing says what the network takes.
    """
    config, spec = getattr(net, "config", None), spec_of(net)
    config, options = getattr(config, "vision_config", config), {} if spec is None else spec.options
    if getattr(config, "vocab_size", None) and not hasattr(config, "patch_size"):
        return _tokens(config)
    height, width = _sides(net, config, options)
    return torch.zeros(1, _channels(net, config, options), height, width)


def _tokens(config: Any) -> dict[str, Tensor]:
    length = min(NUM_TOKENS, getattr(config, "max_position_embeddings", None) or NUM_TOKENS, config.vocab_size - 1)
    padding = getattr(config, "pad_token_id", None)
    words = [token for token in range(config.vocab_size) if token != padding][-length:]
    return {"input_ids": torch.tensor([words]), "attention_mask": torch.ones(1, length, dtype=torch.int64)}


def _sides(net: nn.Module, config: Any, options: dict[str, Any]) -> tuple[int, int]:
    pretrained = getattr(net, "pretrained_cfg", None) or {}
    prepared = preprocessing_of(net)
    known = (
        options.get("image_size"),
        None if prepared is None else prepared.image_size,
        pretrained.get("input_size", (None,) * 3)[1:],
        getattr(config, "image_size", None),
        224 if hasattr(config, "num_channels") else None,  # what transformers' own processors resize to
    )
    for size in known:
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list) and all(isinstance(side, int) for side in size):
            return size[0], size[1]
    raise NetworkError(
        f"cannot tell what inputs this {type(net).__name__} takes. "
        "Pass example inputs of your own, or image_size= to load_network (--image-size)."
    )


def _channels(net: nn.Module, config: Any, options: dict[str, Any]) -> int:
    pretrained = getattr(net, "pretrained_cfg", None) or {}
    default = pretrained.get("input_size", (3,))[0]
    return options.get("in_chans") or getattr(config, "num_channels", None) or default
