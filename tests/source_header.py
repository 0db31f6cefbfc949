"""What stands at the head of a written network: imports, helpers and base classes of people."""

HEADER = """
import abc
import functools
import math
import operator
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
import torch.utils.checkpoint
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor

conv1x1 = partial(nn.Conv2d, kernel_size=1)


def conv3x3(c, out, stride=1, bias=False):
    return nn.Conv2d(c, out, 3, stride, padding=1, bias=bias)


def drop_path(x, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True):
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
    if keep_prob > 0.0 and scale_by_keep:
        random_tensor.div_(keep_prob)
    return x * random_tensor


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def with_shortcut(forward):
    @functools.wraps(forward)
    def call(self, x, *args, **kwargs):
        return x + «forward(self, x, *args, **kwargs)»

    return call


class ConvNormAct(nn.Module):
    def __init__(self, c, out, k=3, s=1, act=True, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(c, out, k, s, k // 2, bias=norm is None)
        self.norm = norm(out) if norm is not None else nn.Identity()
        self.act = nn.SiLU() if act is True else act if isinstance(act, nn.Module) else None

    def forward(self, x):
        x = self.norm(self.conv(x))
        if self.act is not None:
            x = self.act(x)
        return x


class ConvBNReLU(nn.Sequential):
    def __init__(self, c, out, k=3, s=1):
        super().__init__(
            nn.Conv2d(c, out, k, s, (k - 1) // 2, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, *args, **kwargs):
        return «self.fn(x, *args, **kwargs)» + x


class SequentialResidual(nn.Sequential):
    def forward(self, x):
        return x + «super().forward(x)»


class Add(nn.Module):
    def forward(self, a, b):
        return a + b


class AddMixin:
    scale = 1.0

    def merge(self, shortcut, h):
        return self.activate(shortcut + h)

    def activate(self, x):
        return F.relu(x)


class Template(nn.Module, abc.ABC):
    def forward(self, x):
        return self.shortcut(x) + «self.residual(x)»

    def shortcut(self, x):
        return x

    @abc.abstractmethod
    def residual(self, x): ...


@dataclass
class State:
    x: Tensor
    scale: float = 1.0
    mask: Optional[Tensor] = None


class Pair(NamedTuple):
    x: Tensor
    aux: Tensor
"""
