"""What is timed to find the fastest back end, and the key by which the choice is found again.

The key changes with the network, policy, batch size, inputs, device, number of threads and versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.inference.backends import BACKENDS, MICRO_BATCH, NO_EXITS, Driver, Order
from shallowdeep.inference.cascade import Values
from shallowdeep.inference.sizes import built_for
from shallowdeep.inference.stages import as_values
from shallowdeep.networks.calls import distinct_rows
from shallowdeep.versions import version_of

CANDIDATES = tuple(name for name in BACKENDS if name != "plain")
PACKAGES = ("shallowdeep", "torch", "numpy", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Task:
    """What is timed.

    Attributes:
        order: what each back end is asked to run.
        backends: the back ends, with options for each.
        rows: a batch's inputs, as tensors.
        plan: the exit of each sample; ``None``: the policy decides.
        repeats: the median of so many counts.
        allow_plain: not exiting may be chosen.
        progress: show how far it is, on a terminal.
    """

    order: Order
    backends: Mapping[str, Mapping[str, Any]]
    rows: Values
    plan: np.ndarray | None
    repeats: int
    allow_plain: bool = False
    progress: bool = False

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return len(next(iter(self.rows.values())))

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self.order.device

    @property
    def device_name(self) -> str:
        """Of the GPU its own, else the kind of device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def rows_for(self, backend: str) -> Values:
        """A batch as a back end takes it."""
        if BACKENDS[backend].on_tensors:
            return {name: tensor.to(self.device) for name, tensor in self.rows.items()}
        return {name: tensor.cpu().numpy() for name, tensor in self.rows.items()}

    def build(self, backend: str, *, without_exits: bool = False) -> Driver:
        """A back end's driver, with the policy or for the network without exits."""
        policy = NO_EXITS if without_exits else self.order.policy
        options = self.backends.get(backend, {})
        return BACKENDS[backend].build(replace(self.order, policy=policy, options=options))

    def micro_batches(self, driver: Driver) -> list[int]:
        """The numbers of rows at a time that are worth trying with a driver."""
        if self.order.micro_batch is not None:
            return [driver.micro_batch or self.order.micro_batch]
        sizes = built_for(driver)
        # Never fewer than MICRO_BATCH, however small the batches timed here: larger ones may come.
        tried = {MICRO_BATCH, max(MICRO_BATCH, self.batch_size)}
        return sorted({min(rows, sizes[-1]) if sizes else rows for rows in tried})

    def key(self) -> str:
        """Changes with anything that the choice depends on."""
        sdn, order = self.order.sdn, self.order
        words = {
            "taps": sdn.taps,
            "network": _digest(sdn.state_dict()),
            "backbone": repr(sdn.backbone),
            "policy": order.policy.to_dict(),
            "costs": order.costs,
            "precision": order.precision,
            "calibration": None if order.calibration is None else _digest(as_values(order.calibration)),
            "micro_batch": order.micro_batch,
            "backends": {name: dict(options) for name, options in self.backends.items()},
            "inputs": _digest(self.rows),
            "plan": None if self.plan is None else self.plan.tolist(),
            "allow_plain": self.allow_plain,
            "device": self.device_name,
            "threads": torch.get_num_threads(),
            "versions": {name: version_of(name) for name in PACKAGES},
        }
        return hashlib.sha256(json.dumps(words, default=_in_full).encode()).hexdigest()[:32]


def make_task(
    order: Order,
    batch_size: int,
    *,
    inputs: Any = None,
    exit_shares: Sequence[float] | None = None,
    backends: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
    repeats: int = 10,
    allow_plain: bool = False,
    progress: bool = False,
) -> Task:
    """Say what is to be timed.

    Args:
        order: with example inputs; its options go to no back end.
        batch_size: rows of a batch.
        inputs: at least one sample, repeated or cut to a batch; ``None``: random ones.
        exit_shares: how many leave at each of the policy's exits, in place of its decisions; ``None``: the policy
            decides on ``inputs``, and as many leave at each exit of random ones.
        backends: to be timed, with options where it is a mapping; ``None``: all.
        repeats: the median of so many counts.
        allow_plain: not exiting may be chosen.
        progress: show how far it is, on a terminal.

    Raises:
        ConfigError: an argument is not usable.
    """
    if batch_size < 1 or repeats < 1:
        raise ConfigError(f"batch_size and repeats are at least 1, got {batch_size} and {repeats}.")
    if backends is None:
        backends = CANDIDATES
    named = dict(backends) if isinstance(backends, Mapping) else {name: {} for name in backends}
    for name in named:
        if name not in CANDIDATES:
            raise UnknownName("back end with exits", name, CANDIDATES)
    if not named:
        raise ConfigError(f"backends names none to time; there are {', '.join(CANDIDATES)}.")
    if inputs is None:
        rows = as_values(distinct_rows(order.example_inputs, batch_size))
        if exit_shares is None:
            exit_shares = [1 / len(order.exits)] * len(order.exits)
    else:
        values = as_values(inputs)
        rows = {name: tensor[torch.arange(batch_size) % len(tensor)] for name, tensor in values.items()}
    plan = None if exit_shares is None else planned(exit_shares, order.exits, batch_size)
    return Task(order, named, rows, plan, repeats, allow_plain, progress)


def planned(exit_shares: Sequence[float], exits: Sequence[int], rows: int) -> np.ndarray:
    """An exit for each of some rows, in no order, so that each exit gets its share.

    Raises:
        ConfigError: the shares do not fit the exits, or are none.
    """
    shares = np.asarray(exit_shares, dtype=np.float64)
    if shares.shape != (len(exits),) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ConfigError(
            f"exit_shares are one share for each of the exits {list(exits)}, together 1; got {list(exit_shares)}."
        )
    ends = np.round(np.cumsum(shares) * rows)
    stages = np.searchsorted(ends, np.arange(rows), side="right")
    return np.asarray(exits)[np.random.default_rng(0).permutation(stages)]


def _in_full(value: Any) -> str:
    """What JSON has no form for; an array's own text would leave out what lies in its middle."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return _digest({"": value}) if isinstance(value, Tensor) else str(value)


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
