"""A small network whose costs are known by hand, for every test of this room."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture(autouse=True)
def one_thread():
    """With one thread a sum has one order, and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class TinyNet(nn.Module):
    """Multiply-adds at 8×8: stem 64·27·4 = 6,912, each block 2·64·36·4 = 18,432, linear 20; in all 62,228.

    Parameters: stem 108 + 8, each block 2·144 + 2·8 = 304, linear 25; in all 1,053.
    """

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.blocks = nn.Sequential(Block(), Block(), Block())
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(4, 5)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):  # as after a training: no identity
                    nn.init.normal_(module.running_mean, std=0.1)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, x):
        return self.fc(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


@pytest.fixture
def tiny_net():
    """Builds a network of three residual blocks, from a seed; in evaluation mode."""
    return lambda seed=0: TinyNet(seed).eval()


@pytest.fixture
def images():
    """Six images of 8×8 pixels."""
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def num_hooks():
    """Counts the hooks left on a network."""
    return lambda net: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
