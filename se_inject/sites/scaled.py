"""The map in a block graph that an SE block scales, and the kinds of it."""

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
    """Where a unit's transformation ends; a residual addition is one way to see it."""

    kind: ClassVar[SiteKind]

    source: fx.Node  # the map to scale: the SE block reads it
    readers: tuple[fx.Node, ...]  # what reads the scaled map in its place
    channels: int
    layout: Layout
    dtype: torch.dtype
    shapes: tuple[Shape, ...]  # of the map, one a recorded call


@dataclass(frozen=True)
class ResidualSite(ScaledMap):
    """A residual branch."""

    kind = "residual"

    addition: fx.Node
    shortcut: fx.Node  # the operand of the addition that is not the branch
    fused: bool  # the addition alone reads the branch: the SE block takes it over
    shortcut_first: bool  # the sum has the memory format of its first operand
    in_place: bool  # and keeps its dtype too


@dataclass(frozen=True)
class UnitSite(ScaledMap):
    """The end of a unit without an addition: a concatenation, a dense layer, an activation."""

    kind = "unit"
