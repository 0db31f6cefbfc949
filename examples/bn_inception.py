"""BN-Inception as in the authors' Caffe model: ten modules that concatenate their branches.

The network is from Ioffe and Szegedy, Batch Normalization (arXiv 1502.03167). Its widths are those
of the network that the SE paper starts from. Neither timm nor torchvision has it.
"""

import torch
from torch import Tensor, nn


def conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution with its norm and activation."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, size, stride, size // 2),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


class Inception(nn.Module):
    """Four branches over one input. A module of stride 2 has no 1x1 branch, but pools the input."""

    def __init__(
        self,
        c_in: int,
        c1: int,
        c3: tuple[int, int],
        double: tuple[int, int],
        pooled: int,
        pool: type[nn.Module] = nn.AvgPool2d,
    ) -> None:
        super().__init__()
        stride = 1 if c1 else 2
        branches = [conv(c_in, c1, 1)] if c1 else []
        branches.append(nn.Sequential(conv(c_in, c3[0], 1), conv(c3[0], c3[1], 3, stride)))
        first, rest = double
        branches.append(
            nn.Sequential(conv(c_in, first, 1), conv(first, rest, 3), conv(rest, rest, 3, stride))
        )
        if pooled:
            branches.append(nn.Sequential(pool(3, 1, 1), conv(c_in, pooled, 1)))
        else:
            branches.append(nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True)))
        self.branches = nn.ModuleList(branches)
        self.out_channels = c1 + c3[1] + rest + (pooled or c_in)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


# The widths of 1x1, (reduce, 3x3), (reduce, double 3x3) and the convolution behind the pooling. A
# module whose first and last widths are 0 has stride 2.
WIDTHS = [
    (64, (64, 64), (64, 96), 32),
    (64, (64, 96), (64, 96), 64),
    (0, (128, 160), (64, 96), 0),
    (224, (64, 96), (96, 128), 128),
    (192, (96, 128), (96, 128), 128),
    (160, (128, 160), (128, 160), 128),
    (96, (128, 192), (160, 192), 128),
    (0, (128, 192), (192, 256), 0),
    (352, (192, 320), (160, 224), 128),
]


class BNInception(nn.Module):
    """The whole network, for images [N, 3, 224, 224]."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv(3, 64, 7, 2),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            conv(64, 64, 1),
            conv(64, 192, 3),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        modules: list[Inception] = []
        channels = 192
        for widths in WIDTHS:
            modules.append(Inception(channels, *widths))
            channels = modules[-1].out_channels
        modules.append(Inception(channels, 352, (192, 320), (192, 224), 128, nn.MaxPool2d))
        self.inception = nn.Sequential(*modules)
        self.fc = nn.Linear(modules[-1].out_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inception(self.stem(x)).mean((2, 3)))
