"""ResNets of depth 6n+2 and WideResNet-32-4 for 32 and 64 pixels, as in the Shallow-Deep Networks paper."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

STEM_STRIDE = {32: 1, 64: 2}


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, a projection with batch-norm where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class WideBlock(nn.Module):
    """Pre-activation block: the stride sits on the second 3×3 convolution, the shortcut has no batch-norm."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class ResNet(nn.Module):
    """Stem, three stages of basic blocks with 16, 32 and 64 channels, global average pooling, linear.

    - input ``(n, 3, image_size, image_size)``
    - output ``(n, num_classes)``
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int, num_classes: int, image_size: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, STEM_STRIDE[image_size], padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        for i, (channels, out) in enumerate([(16, 16), (16, 32), (32, 64)]):
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            stage = [BasicBlock(channels if j == 0 else out, out, s) for j, s in enumerate(strides)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(64, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class WideResNet(nn.Module):
    """Stem, three stages of five pre-activation blocks with 64, 128 and 256 channels, pooling, linear.

    - input ``(n, 3, image_size, image_size)``
    - output ``(n, num_classes)``

    The final batch-norm keeps PyTorch's momentum of 0.1, which is what the authors' converted networks
    really train with.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, num_classes: int, image_size: int, blocks: int = 5, width: int = 4, dropout: float = 0.3):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, STEM_STRIDE[image_size], padding=1)
        sizes = (16, 16 * width, 32 * width, 64 * width)
        for i, (channels, out) in enumerate(pairwise(sizes)):
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            stage = [WideBlock(channels if j == 0 else out, out, s, dropout) for j, s in enumerate(strides)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(sizes[-1])
        self.fc = nn.Linear(sizes[-1], num_classes)
        self.apply(_initialise_wide)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        x = F.relu(self.bn(self.layer3(self.layer2(self.layer1(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


def _initialise_wide(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight, gain=2**0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def resnet20(num_classes: int, image_size: int = 32) -> ResNet:
    """ResNet of depth 20: 9 blocks, 0.27 M parameters."""
    return ResNet(3, num_classes, image_size)


def resnet56(num_classes: int, image_size: int = 32) -> ResNet:
    """ResNet of depth 56: 27 blocks, 0.856 M parameters and 125.7 M multiply-adds at 10 classes."""
    return ResNet(9, num_classes, image_size)


def resnet110(num_classes: int, image_size: int = 32) -> ResNet:
    """ResNet of depth 110: 54 blocks, 1.73 M parameters."""
    return ResNet(18, num_classes, image_size)


def wrn32_4(num_classes: int, image_size: int = 32) -> WideResNet:
    """WideResNet-32-4: 15 blocks, 7.40 M parameters and 1185 M multiply-adds at 10 classes."""
    return WideResNet(num_classes, image_size)
