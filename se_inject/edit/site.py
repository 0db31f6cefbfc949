"""One SE block to be inserted, and the layer that is made for it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from se_inject.errors import ArgumentError
from se_inject.layers.attention import SELayer
from se_inject.layers.cost import SECost
from se_inject.layers.layout import Layout
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.variant import Variant
from se_inject.names import block_label
from se_inject.sites.scaled import ScaledMap, SiteKind

# A bottleneck with this many channels is a mistake of the user, not a lack of memory.
_ABSURD = 2**20


@dataclass(frozen=True)
class Site:
    """One SE block to be inserted. MACs are for one image."""

    block: str  # "layer1.0"; "" is the model itself
    child: str  # the attribute that will hold the SE block, such as "se"
    channels: int
    r: int
    bottleneck: int | None  # None where a user's se_layer makes the block
    shape: tuple[int, ...]  # (C, H, W) or (C, T, H, W) of the scaled map in the first call
    layout: Layout
    cost: SECost
    device: torch.device
    dtype: torch.dtype
    where: tuple[ScaledMap, ScaledMap] = field(repr=False)  # in the eval graph, in the train graph

    @property
    def kind(self) -> SiteKind:
        """``"residual"`` on a residual branch, and ``"unit"`` at the end of another unit."""
        return self.where[0].kind

    @property
    def ends_block(self) -> bool:
        """Whether the SE block scales the one map that the block returns."""
        return all(reader.op == "output" for reader in self.where[0].readers)

    @property
    def params(self) -> int:
        """How many parameters the SE block adds."""
        return self.cost.params

    @property
    def macs(self) -> int:
        """How many multiply-accumulates it adds for one image: layers, squeeze and scale."""
        return self.cost.macs

    @property
    def name(self) -> str:
        """The dotted name of the SE block in the model, such as ``layer1.0.se``."""
        return f"{self.block}.{self.child}".lstrip(".")

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON-ready data."""
        return {
            "block": self.block,
            "kind": self.kind,
            "child": self.child,
            "channels": self.channels,
            "r": self.r,
            "bottleneck": self.bottleneck,
            "shape": list(self.shape),
            "params": self.params,
            "macs": self.macs,
        }


def make_layer(site: Site, variant: Variant, se_layer: SELayer | None) -> nn.Module:
    """Make the SE block (or the user's layer) of a site, on its device and in its dtype."""
    if se_layer is not None:
        layer = se_layer(site.channels)
        if not isinstance(layer, nn.Module):
            raise ArgumentError(
                f"se_layer({site.channels}) returned {type(layer).__name__}."
                " It must return an nn.Module."
            )
        layer.to(device=site.device, dtype=site.dtype)
        return layer
    assert site.bottleneck is not None
    try:
        return SqueezeExcite(
            site.channels,
            site.bottleneck,
            layout=site.layout,
            squeeze=variant.squeeze,
            gate=variant.gate,
            bias=variant.bias,
            init=variant.init,
            shift=variant.shift,
            device=site.device,
            dtype=site.dtype,
        )
    except (RuntimeError, TypeError, MemoryError) as error:
        if site.bottleneck < _ABSURD:
            raise
        raise ArgumentError(
            f"an SE block of {block_label(site.block)} with a bottleneck of {site.bottleneck}"
            f" channels cannot be made: divisor={variant.divisor} is too large (8 is usual)."
        ) from error
