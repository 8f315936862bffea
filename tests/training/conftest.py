from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from shallowdeep.data.samples import Splits
from shallowdeep.data.sources import load_data
from shallowdeep.networks.attach import attach
from shallowdeep.networks.sdn import ShallowDeepNetwork


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> Splits:
    return load_data("digits")


@pytest.fixture(scope="session")
def build(digits: Splits) -> Callable[..., ShallowDeepNetwork]:
    """Builds the same small network with two internal exits each time; dropout and batch-norm are in it."""

    def build(taps=("2", "5"), seed=0, num_classes=10, **options) -> ShallowDeepNetwork:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, stride=2, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(256, num_classes),
            )
            return attach(net, digits.example_inputs, taps=taps, **options)

    return build
