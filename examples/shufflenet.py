"""ShuffleNet 1x with three groups (Zhang et al., arXiv 1707.01083), a base of the paper's Table 3.

A unit of stride 1 adds its input, and a unit of stride 2 concatenates the pooled input. Neither
timm nor torchvision has this network. torchvision has only ShuffleNetV2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 3


def conv(c_in: int, c_out: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution with its norm."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    )


class Unit(nn.Module):
    """A grouped pointwise convolution, a shuffle, a depthwise and another pointwise convolution."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        width = c_out // 4
        made = c_out - c_in if stride == 2 else c_out
        self.reduce = conv(c_in, width, groups=groups)
        self.depthwise = conv(width, width, 3, stride, width)
        self.expand = conv(width, made, groups=GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.reduce(x))
        n, c, h, w = out.shape
        out = out.view(n, GROUPS, c // GROUPS, h, w).transpose(1, 2).reshape(n, c, h, w)
        out = self.expand(self.depthwise(out))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), out], 1))
        return F.relu(x + out)


class ShuffleNet(nn.Module):
    """The whole network, for images [N, 3, 224, 224]."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 24, 3, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        units: list[Unit] = []
        channels = 24
        for width, repeats in ((240, 4), (480, 8), (960, 4)):
            for i in range(repeats):
                # The very first pointwise convolution has too few channels for groups.
                groups = 1 if channels == 24 else GROUPS
                units.append(Unit(channels, width, 2 if i == 0 else 1, groups))
                channels = width
        self.units = nn.Sequential(*units)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean((2, 3)))
