"""Trained weights from a file of the user's, put into a network that was built for them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shallowdeep.errors import FileFormatError, NetworkError
from shallowdeep.networks.calls import first_line
from shallowdeep.storage import misfits

WRAPPINGS = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights among other things


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict: a safetensors file, or one of ``torch.save`` that holds tensors alone.

    Raises:
        FileFormatError: there is no such file, or it is neither; nothing is ever unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(
            f"no file of weights {path}. Name a safetensors file or a torch state dict that is there."
        )
    try:
        found = _read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{path} is no file of weights alone ({first_line(error)}). "
            "Save them anew: safetensors.torch.save_file(net.state_dict(), path)."
        ) from error
    return _state_dict(found, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPINGS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise FileFormatError(f"{path} holds no state dict, names to tensors. Save net.state_dict() alone.")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def put_weights(
    net: nn.Module, tensors: Mapping[str, Tensor], source: str, *, num_classes: int | None = None, spare: tuple = ()
) -> bool:
    """Load a state dict; classification layers of another number of classes keep their fresh weights.

    Args:
        net: changed.
        tensors: the state dict.
        source: where it comes from, for the message.
        num_classes: what was asked for; ``None``: every tensor must fit.
        spare: beginnings of names that the network may lack.

    Returns:
        Whether a layer kept its fresh weights.

    Raises:
        NetworkError: names or shapes differ; nothing was loaded.
    """
    own = net.state_dict()
    # Modules note versions beside their weights; a file of weights alone has lost them.
    own._metadata = getattr(tensors, "_metadata", own._metadata)  # type: ignore[attr-defined]
    given = {name: tensor for name, tensor in tensors.items() if name in own or not name.startswith(tuple(spare))}
    fresh = [name for name in given if name in own and _other_classes(own[name].shape, given[name].shape, num_classes)]
    given |= {name: own[name] for name in fresh}
    wrong = misfits(own, given)
    if wrong:
        raise NetworkError(
            f"the weights of {source} do not fit the network: {len(wrong)} names or shapes differ, first '{wrong[0]}'. "
            "Build the network with the options it was trained with."
        )
    own.update(given)
    net.load_state_dict(own)
    return bool(fresh)


def _other_classes(own: torch.Size, given: torch.Size, num_classes: int | None) -> bool:
    return own != given and len(own) == len(given) and own[0] == num_classes and own[1:] == given[1:]
