"""A network that trains in a blink, for cells that are run in tests."""

from torch import nn


def build(num_classes: int = 10) -> nn.Module:
    """Two convolutions; taps "1" and "3" are legal."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(16 * 5 * 5),
        nn.Linear(16 * 5 * 5, num_classes),
    )


RUN = {
    "data": "digits",
    "network": "studies.tiny_network:build",
    "recipe.epochs": 2,
    "recipe.batch_size": 32,
    "recipe.lr": 0.02,
    "threads": 1,
    "device": "cpu",
}
"""A run of it on digits that takes seconds, as a configuration's changes."""
