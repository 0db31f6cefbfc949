"""A table of the kinds of feature maps, and the layouts that say what each dim of a map is.

A new kind of map needs a new row in :data:`KINDS`.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Kind:
    """Feature maps of one rank: which layers make them, and how people write their dims."""

    rank: int  # the number of dims of the tensor, the batch included
    convolution: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    functions: frozenset[str]  # the torch functions that convolve such maps
    axes: str  # the dims of one item, channels first
    channels_last: bool  # whether [N, *space, C] is such a map too; [N, L, C] are tokens
    # The input sizes to try, in this order, where nothing says which one is right. A hand-written
    # network for small inputs flattens to a fixed size and rejects the usual one.
    spaces: tuple[tuple[int, ...], ...]


KINDS: dict[int, Kind] = {
    kind.rank: kind
    for kind in (
        Kind(
            3,
            nn.Conv1d,
            frozenset({"conv1d", "conv_transpose1d"}),
            "C×L",
            channels_last=False,
            spaces=tuple((n,) for n in (1024, 128, 4096, 256, 512, 1000, 2048, 500, 5000, 16000)),
        ),
        Kind(
            4,
            nn.Conv2d,
            frozenset({"conv2d", "conv_transpose2d"}),
            "C×H×W",
            channels_last=True,
            spaces=tuple((n, n) for n in (224, 32, 64, 28, 96, 128, 256, 512)),
        ),
        Kind(
            5,
            nn.Conv3d,
            frozenset({"conv3d", "conv_transpose3d"}),
            "C×T×H×W",
            channels_last=True,
            spaces=tuple((16, n, n) for n in (112, 224, 64)),
        ),
    )
}
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = tuple(kind.convolution for kind in KINDS.values())


@dataclass(frozen=True)
class Layout:
    """Which dim of a feature map is which. Dim 0 is the batch.

    >>> Layout(4, 1).space, Layout(5, 1).space, Layout(4, 3).space, Layout(3, 1).space
    ((-2, -1), (-3, -2, -1), (-3, -2), (-1,))
    """

    ndim: int  # a key of KINDS
    channel_dim: int  # 1 means channels first, ndim - 1 means channels last

    @property
    def space(self) -> tuple[int, ...]:
        """The dims that the squeeze averages over.

        They are counted from the end, so that a map without a batch dim works too.
        """
        return tuple(d - self.ndim for d in range(1, self.ndim) if d != self.channel_dim)

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last dim, on which Linear layers act."""
        return self.channel_dim == self.ndim - 1

    @property
    def is_map(self) -> bool:
        """Whether a tensor with this layout is a feature map."""
        kind = KINDS.get(self.ndim)
        if kind is None:
            return False
        return self.channel_dim == 1 or (self.channels_last and kind.channels_last)


IMAGES = Layout(4, 1)


def pointwise(
    layout: Layout,
    width_in: int,
    width_out: int,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    *,
    zero: bool = False,
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear:
    """Make a layer over the channels alone: a convolution of size 1, or a Linear for channels last.

    With ``zero``, its parameters are 0 and no random numbers are drawn for them.
    """
    if zero:
        layer = pointwise(layout, width_in, width_out, bias, "meta", dtype)
        for name, parameter in list(layer.named_parameters()):
            zeros = torch.zeros(parameter.shape, device=device, dtype=dtype)
            setattr(layer, name, nn.Parameter(zeros))
        return layer
    if layout.channels_last:
        return nn.Linear(width_in, width_out, bias, device=device, dtype=dtype)
    convolution = KINDS[layout.ndim].convolution
    return convolution(width_in, width_out, 1, bias=bias, device=device, dtype=dtype)


def first_convolution(model: nn.Module) -> Convolution | None:
    """The first convolution of a model. It tells the kind and the channels of the model's input."""
    return next((m for m in model.modules() if isinstance(m, CONVOLUTIONS)), None)


def kind_of(convolution: nn.Module | None) -> Kind:
    """The kind of map that a convolution takes. Without a convolution, images are assumed."""
    return next((k for k in KINDS.values() if isinstance(convolution, k.convolution)), KINDS[4])
