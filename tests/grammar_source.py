"""What a grammar writes: the source of modules and networks, with the right answer beside."""

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from torch import nn

from se_inject.reasons import Reason

HEADER = """\
import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.autograd import Variable


class Gate(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Conv2d(c, c, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Scale(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((c, 1, 1), 0.5))

    def forward(self, x):
        return x * self.gamma
"""


@dataclass
class Source:
    """A module being written, and what a plan must say of it (names relative to it)."""

    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # of its children, written out
    sites: Counter[tuple[str, int]] = field(default_factory=Counter)  # (block, channels)
    skipped: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    gated: bool = False  # a gate somewhere in it
    depth: int = 0  # most layers over channels on a path through it
    one_spatial: bool = False  # its branch begins with one convolution, a spatial one
    stride: int = 1
    arguments: str = "x"  # of its forward
    methods: list[str] = field(default_factory=list)  # beside its forward

    def child(self, stem: str, made: str) -> str:
        """Add a child and return the expression that calls it."""
        name = f"{stem}{len(self.init)}"
        self.init.append(f"self.{name} = {made}")
        return f"self.{name}"

    def nest(self, name: str, inner: "Source") -> None:
        """Take over what is said of a child."""
        self.classes += inner.classes
        self.gated |= inner.gated
        for (block, channels), n in inner.sites.items():
            self.sites[f"{name}.{block}".rstrip("."), channels] += n
        for (block, reason), n in inner.skipped.items():
            self.skipped[f"{name}.{block}".rstrip("."), reason] += n

    def write(self, name: str) -> str:
        """The text of the class."""
        init = "\n".join(["super().__init__()", *self.init])
        forward = "\n".join(self.forward)
        return (
            f"class {name}(nn.Module):\n    def __init__(self):\n{textwrap.indent(init, ' ' * 8)}\n"
            f"\n    def forward(self, {self.arguments}):\n{textwrap.indent(forward, ' ' * 8)}\n"
        ) + "".join(f"\n{textwrap.indent(method, ' ' * 4)}\n" for method in self.methods)


@dataclass(frozen=True)
class Network:
    """A whole network as text, and the right answer."""

    text: str
    sites: Counter[tuple[str, int]]
    skipped: Counter[tuple[str, Reason]]

    @property
    def where(self) -> str:
        """What to ask for. Where all sums can be folded, ``auto`` asks for units."""
        reasons = {reason for _, reason in self.skipped}
        return "residual" if not self.sites and reasons <= {Reason.REPARAMETERISABLE} else "auto"

    def build(self) -> nn.Module:
        namespace: dict[str, Any] = {"__name__": "written"}
        exec(compile(self.text, "<written network>", "exec", dont_inherit=True), namespace)
        return namespace["Net"]()


Draw = Callable[[st.SearchStrategy[Any]], Any]


def chance(draw: Draw, of: int = 2) -> bool:
    return draw(st.integers(0, of - 1)) == of - 1
