"""A wrapper that lets another attention layer begin as the identity, as the SE block does."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from se_inject.layers.attention import Attention, SELayer


class IdentityStart(nn.Module):
    """``x + alpha * (layer(x) - x)`` with a learnable ``alpha`` of shape [1] that begins at 0.

    At the start the output is ``x`` itself, whatever the layer computes. This needs a finite
    ``layer(x) - x``, because 0 times infinity would be NaN. At ``alpha = 1`` the output is that of
    the layer. In the first training step, only ``alpha`` has a gradient other than 0. The layer
    learns as soon as ``alpha`` has moved.

    >>> import torch
    >>> from torch import nn
    >>> layer = IdentityStart(nn.Conv2d(8, 8, 1))
    >>> x = torch.randn(2, 8, 4, 4)
    >>> torch.equal(layer(x), x)
    True

    Args:
        layer: a layer that turns a map [N, C, H, W] into a map of the same shape. It must not write
            into its input. It must not begin as the identity by itself either, because ``alpha``
            would then have no gradient that moves it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.alpha = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Begin as the identity again. The layer inside has its own ``reset_parameters``."""
        nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """The output has the dtype of ``x``. Under autocast the layer's dtype may be another."""
        change = self.layer(x).to(x.dtype) - x
        total: Tensor = x + self.alpha.to(x.dtype) * change
        return total


@dataclass(frozen=True)
class FromIdentity:
    """``channels -> nn.Module``: the layers of another ``se_layer``, each in an IdentityStart."""

    se_layer: SELayer

    def __call__(self, channels: int) -> nn.Module:
        layer = self.se_layer(channels)
        # The caller refuses what is not a module, and a layer that has a start needs no second one.
        if not isinstance(layer, nn.Module) or isinstance(layer, IdentityStart):
            return layer
        # timm ends its non-local layer with a norm whose scale is 0. Beside an alpha of 0, neither
        # of the two would ever have a gradient.
        if isinstance(self.se_layer, Attention) and self.se_layer.name == "nl":
            for name, scale in layer.named_parameters():
                if name == "norm.weight":
                    nn.init.ones_(scale)
        return IdentityStart(layer)


def without_start(se_layer: SELayer | None) -> SELayer | None:
    """The ``se_layer`` inside a :class:`FromIdentity`, or the given one if it is none."""
    return se_layer.se_layer if isinstance(se_layer, FromIdentity) else se_layer


def kind_of_layer(layer: nn.Module) -> str:
    """The name of an inserted layer's class, as messages show it."""
    return type(layer.layer if isinstance(layer, IdentityStart) else layer).__name__
