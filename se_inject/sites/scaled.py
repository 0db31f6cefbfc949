"""The map in a block graph that an SE block scales, and its two kinds."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from se_inject.graph.recording.call import Shape
from se_inject.layers.layout import Layout

SiteKind = Literal["residual", "unit"]
# Which maps get SE blocks; plan_se explains the words.
Where = Literal["auto", "residual", "units"]


@dataclass(frozen=True)
class ScaledMap:
    """The map at which the transformation of a unit ends. A residual branch is such a unit too."""

    kind: ClassVar[SiteKind]

    source: fx.Node  # the map that the SE block reads and scales
    readers: tuple[fx.Node, ...]  # the nodes that read the scaled map in its place
    channels: int
    layout: Layout
    dtype: torch.dtype
    shapes: tuple[Shape, ...]  # the shape of the map in each recorded call


@dataclass(frozen=True)
class ResidualSite(ScaledMap):
    """A residual branch."""

    kind = "residual"

    addition: fx.Node
    shortcut: fx.Node  # the operand of the addition that is not the branch
    fused: bool  # whether the SE block takes over the addition, which alone reads the branch
    shortcut_first: bool  # whether the shortcut is the first operand, which gives the memory format
    in_place: bool  # whether the sum is in place, so that the first operand gives the dtype too


@dataclass(frozen=True)
class UnitSite(ScaledMap):
    """The end of a unit without an addition: a concatenation, a dense layer, an activation."""

    kind = "unit"
