"""VGG-16 with batch-norm for 32 and 64 pixels, as in the Shallow-Deep Networks paper."""

from __future__ import annotations

import math

from torch import Tensor, nn

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOL_AFTER = (1, 3, 6, 9, 12)
HIDDEN = {32: (512, 512), 64: (2048, 1024)}


class VGG(nn.Module):
    """Thirteen convolutions and three linear layers; ``layers`` holds the 14 blocks the paper counts.

    - input ``(n, 3, image_size, image_size)``
    - output ``(n, num_classes)``

    There is no ReLU between the last two linear layers, as in the authors' network.
    """

    def __init__(self, num_classes: int, image_size: int):
        super().__init__()
        first, second = HIDDEN[image_size]
        blocks: list[nn.Module] = [
            _conv_block(channels, out, pool=i in POOL_AFTER)
            for i, (channels, out) in enumerate(zip((3, *CHANNELS), CHANNELS, strict=False))
        ]
        flat = CHANNELS[-1] * (image_size // 2 ** len(POOL_AFTER)) ** 2
        blocks.append(nn.Sequential(nn.Flatten(), nn.Linear(flat, first), nn.ReLU(), nn.Dropout(0.5)))
        self.layers = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Linear(first, second), nn.Dropout(0.5), nn.Linear(second, num_classes))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.classifier(self.layers(x))


def _conv_block(channels: int, out: int, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def vgg16(num_classes: int, image_size: int = 32) -> VGG:
    """VGG-16-BN: 15.25 M parameters and 313.7 M multiply-adds at 32 pixels and 10 classes."""
    return VGG(num_classes, image_size)
