"""What PyTorch's compiler needs on a machine."""

from __future__ import annotations

import torch

from shallowdeep.errors import ConfigError
from shallowdeep.networks.calls import first_line


def check_compiler(device: torch.device, wanted_by: str, instead: str) -> None:
    """Look for what PyTorch's compiler needs on a device.

    Args:
        device: that shall run what it makes.
        wanted_by: option that asks for it, e.g. ``"compile=True"``.
        instead: what to do without one, as the end of a sentence.

    Raises:
        ConfigError: it is not there.
    """
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(f"{wanted_by} needs Triton on {device.type}: install it, or {instead}.")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"{wanted_by} needs a C++ compiler ({first_line(error)}). "
            f"Install g++, name another one in the environment variable CXX, or {instead}."
        ) from error
