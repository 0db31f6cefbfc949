"""Layouts of feature maps, in one table: rank, channel dim, and the layer over the channels."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Which dims of a feature map are which; dim 0 is the batch.

    >>> Layout(4, 1).space, Layout(5, 1).space, Layout(4, 3).space
    ((-2, -1), (-3, -2, -1), (-3, -2))
    """

    ndim: int  # 4: images, 5: video
    channel_dim: int  # 1: channels first, ndim - 1: channels last

    @property
    def space(self) -> tuple[int, ...]:
        """The dims that the squeeze averages over, from the end: an image without batch works."""
        return tuple(d - self.ndim for d in range(1, self.ndim) if d != self.channel_dim)

    @property
    def channels_last(self) -> bool:
        """Whether Linear layers act on the channels."""
        return self.channel_dim == self.ndim - 1


IMAGES = Layout(4, 1)


def pointwise(
    layout: Layout,
    width_in: int,
    width_out: int,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Conv2d | nn.Conv3d | nn.Linear:
    """A layer over the channels alone."""
    if layout.channels_last:
        return nn.Linear(width_in, width_out, bias, device=device, dtype=dtype)
    convolution = nn.Conv3d if layout.ndim == 5 else nn.Conv2d
    return convolution(width_in, width_out, 1, bias=bias, device=device, dtype=dtype)
