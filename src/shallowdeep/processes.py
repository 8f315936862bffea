"""One process or several: which one this is, what the others have got, and how many threads it takes."""

from __future__ import annotations

import atexit
import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shallowdeep.errors import ConfigError
from shallowdeep.quiet import quiet

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(
    device: str = "auto",
    *,
    devices: int | None = None,
    num_nodes: int = 1,
    precision: Any = "32-true",
    all_used: bool = True,
) -> Fabric:
    """Lightning Fabric over the processes that there are, or that it starts.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or another accelerator that Fabric knows.
        devices: processes on each machine, one a device. ``None``: as many as ``torchrun`` started, else one.
        num_nodes: machines; under ``torchrun`` it is what that was told.
        precision: of Fabric, e.g. ``"bf16-mixed"``.
        all_used: every weight that is trained gets a gradient in every step; several processes otherwise look for
            those that do not.

    Raises:
        ConfigError: there is no such device, or not so many, or the processes there are do not belong to it.
    """
    from lightning_fabric import Fabric  # 0.7 s that only training and several processes need

    if "LOCAL_WORLD_SIZE" in os.environ:
        local, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if devices not in (None, local):
            raise ConfigError(f"devices={devices}, but torchrun started {local} processes a machine. Leave it out.")
        devices, num_nodes = local, world // local
    several = (devices or 1) * num_nodes > 1
    try:
        with quiet("lightning_fabric.utilities.rank_zero", below=logging.WARNING):
            fabric = Fabric(
                accelerator=device,
                devices=devices or 1,
                num_nodes=num_nodes,
                precision=precision,
                strategy=("ddp" if all_used else "ddp_find_unused_parameters_true") if several else "auto",
            )
        fabric.launch()
    except Exception as error:  # ValueError, RuntimeError or Fabric's own, as the accelerator has it
        why = textwrap.shorten(str(error), 200, placeholder="…") or type(error).__name__
        count = f" (devices={devices or 1}, num_nodes={num_nodes})" if several else ""
        raise ConfigError(
            f"device '{device}'{count} cannot be used here: {why}. Take 'auto', 'cpu', or 'cuda' where there is one."
        ) from None
    if fabric.world_size != shard()[1]:
        raise ConfigError(
            f"there are {shard()[1]} processes already, and training would use {fabric.world_size}. Start them with "
            f"torchrun, or give devices={shard()[1]} (and num_nodes) in every call."
        )
    if fabric.world_size > 1:
        atexit.unregister(_leave)
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Let the process group go before the interpreter does: its threads otherwise end the process with an abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join(device: str = "auto", *, devices: int | None = None, num_nodes: int = 1) -> None:
    """Find the other processes, or start them, before anything is read or written; nothing where there is one.

    Raises:
        ConfigError: as ``make_fabric``.
    """
    if (devices or 1) * num_nodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        make_fabric(device, devices=devices, num_nodes=num_nodes)


def shard() -> tuple[int, int]:
    """This process's rank and the number of processes; ``(0, 1)`` where there is one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process is the one that writes files and talks."""
    return shard()[0] == 0


def wait_for_all() -> None:
    """Return when every process is here."""
    if shard()[1] > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """What each process has, in every process, by rank."""
    number = shard()[1]
    if number == 1:
        return [value]
    found: list[Any] = [None] * number
    dist.all_gather_object(found, value)
    return found


@contextmanager
def num_threads(number: int | None) -> Iterator[None]:
    """So many threads on the CPU, ``None``: as many as there are; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
