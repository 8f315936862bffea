"""MobileNet v1 for 32 and 64 pixels, as in the Shallow-Deep Networks paper."""

from __future__ import annotations

from torch import Tensor, nn

BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""Output channels and stride of each block."""


class MobileNet(nn.Module):
    """Stem of stride 1, 13 depthwise-separable ``blocks``, global average pooling, linear.

    - input ``(n, 3, image_size, image_size)``
    - output ``(n, num_classes)``
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        channels = (32, *(out for out, _ in BLOCKS))
        self.blocks = nn.Sequential(*(_separable(c, *block) for c, block in zip(channels, BLOCKS, strict=False)))
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def _separable(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def mobilenet(num_classes: int, image_size: int = 32) -> MobileNet:
    """MobileNet v1: 3.22 M parameters and 46.4 M multiply-adds at 32 pixels and 10 classes."""
    return MobileNet(num_classes)
