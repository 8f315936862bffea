"""What a study's cells will still cost: FLOPs counted on a network without numbers, hours from cells run here."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shallowdeep.config import RunConfig
from shallowdeep.errors import FileFormatError
from shallowdeep.networks.attach import total_flops
from shallowdeep.networks.zoo import NETWORKS, load_network
from shallowdeep.runs.run import Run
from shallowdeep.storage import read_json
from shallowdeep.studies.cells import Cell, Place
from shallowdeep.studies.measurement import median_epoch, read_history
from shallowdeep.studies.tasks import TASKS


def training_flops(cell: Cell) -> float | None:
    """FLOPs of a cell's training on complete data; ``None``: the data or the network is none of ours."""
    config = cell.config
    if config.data not in TASKS or config.network not in NETWORKS:
        return None
    task = TASKS[config.data]
    held_out = task.num_held_out if config.val_size is None else config.val_size
    forward = forward_flops(config.network, task.num_classes, task.image_size) * (task.num_images - held_out)
    return flops_of_training(config, float(forward), cell.epochs)


def flops_of_training(config: RunConfig, one_pass: float, epochs: int) -> float:
    """FLOPs of a training, the cell it starts from not counted.

    A trained backbone is run forward and costs twice that backward; a frozen one is only run forward, in every
    epoch or once per recorded pass. Exits are left out: they cost a few per cent.

    Args:
        config: of the run.
        one_pass: FLOPs of the backbone, forward, over all images trained on.
        epochs: of the training.
    """
    if config.strategy in ("ic_only", "distil"):
        return one_pass * (config.features.passes or epochs)
    return 3.0 * one_pass * epochs


@functools.cache
def forward_flops(network: str, num_classes: int, image_size: int) -> int:
    """FLOPs of one of our networks for one image, counted on tensors without numbers.

    >>> round(forward_flops("vgg16", 10, 32) / 2e6, 1)
    313.7
    """
    with torch.device("meta"):
        net = load_network(network, num_classes=num_classes, image_size=image_size)
        return total_flops(net, torch.zeros(1, 3, image_size, image_size))


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of the trainings in a place, on the accelerator that will be used, by data and network."""

    measured: Mapping[tuple[str, str], float]

    def of(self, cell: Cell) -> float | None:
        """That of the same network on the same data, else on any, else the median of all; ``None``: none at all."""
        data, network = cell.config.data, cell.config.network
        if (data, network) in self.measured:
            return self.measured[data, network]
        near = [rate for (_, other), rate in self.measured.items() if other == network] or self.measured.values()
        return statistics.median(near) if near else None

    def know(self, network: str) -> bool:
        """Whether a training of this network was measured, on any data: others' rates can be several times its own."""
        return any(network == other for _, other in self.measured)


def measure_rates(place: Place) -> Rates:
    """From the histories of all runs that lie in a place; exits trained alone are left out, they cost other things."""
    here = torch.cuda.get_device_name() if place.device != "cpu" and torch.cuda.is_available() else None
    work: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for path in sorted(place.runs.rglob("history.jsonl")):
        try:
            run = Run.open(path.parent)
            history = read_history(run)
            elsewhere = read_json(path.parent / "environment.json")["accelerator"] != here
        except (FileFormatError, KeyError, TypeError):
            continue  # the cell's own state says that it is damaged
        config = run.config
        cell = Cell(name=str(path.parent), strategy=config.strategy, config=config, command=())
        flops = None if elsewhere or config.strategy in ("ic_only", "distil") else training_flops(cell)
        if flops is not None:
            done = flops * len(history) / cell.epochs, median_epoch(history) * len(history)
            work.setdefault((config.data, config.network), []).append(done)
    return Rates({key: sum(f for f, _ in parts) / sum(s for _, s in parts) for key, parts in work.items()})
