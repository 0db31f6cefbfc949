"""Gates that a block is given by its caller: its branch has channel attention all the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_inject import plan_se
from se_inject.reasons import Reason

C = 16


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Child(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv = Conv()
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._function(self.conv, *args, **kwargs)


class Parent(nn.Module):
    """Computes a gate of x and calls its child in the way that a test wants."""

    def __init__(self, child: Callable[..., Tensor], call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.spatial = nn.Linear(C, C), nn.Conv2d(C, 1, 1)
        self.weight = nn.Parameter(torch.ones(1, C, 1, 1))
        self.conv, self.child = Conv(), Child(child)
        self._call = call

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self, x)


def in_place(conv: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    y = conv(x)
    y *= g
    y += x
    return y


def expanded(conv: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    return conv(x) * g.reshape(x.size(0), -1, 1, 1).expand_as(x) + x


def by_name(conv: nn.Module, x: Tensor, *, cond: dict[str, Tensor] | None = None) -> Tensor:
    y = conv(x)
    return x + (y if cond is None else y * cond["gate"])


GATED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "times": (lambda conv, x, g: x + conv(x) * g, lambda p, x: p.child(x, p.gate(x))),
    "in place": (in_place, lambda p, x: p.child(x, p.gate(x))),
    "expanded": (expanded, lambda p, x: p.child(x, p.gate(x).flatten(1))),
    "in a dict": (by_name, lambda p, x: p.child(x, cond={"gate": p.gate(x)})),
    "in a list": (
        lambda conv, xs: xs[0] + conv(xs[0]) * xs[1],
        lambda p, x: p.child([x, p.gate(x)]),
    ),
    "before a convolution": (
        lambda conv, y, g, x: conv(F.relu(y) * g) + x,
        lambda p, x: p.child(y := p.conv(x), p.gate(y), x),
    ),
    "only added": (
        lambda conv, y, g, x: x + y * g,
        lambda p, x: p.child(y := p.conv(x), p.gate(y), x),
    ),
}
NOT_GATED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "one number for all channels": (
        lambda conv, x, g: x + conv(x) * g,
        lambda p, x: p.child(x, torch.sigmoid(p.spatial(x))),
    ),
    "a weight": (lambda conv, x, g: x + conv(x) * g, lambda p, x: p.child(x, p.weight)),
    "a style": (
        lambda conv, x, g: x + conv(x) * g,
        lambda p, x: p.child(x, p.linear(x.new_ones(x.size(0), C))[:, :, None, None]),
    ),
    "on the trunk": (lambda conv, x: x + conv(x), lambda p, x: p.child(x * p.gate(x))),
    "not used": (lambda conv, x, g: x + conv(x), lambda p, x: p.child(x, p.gate(x))),
}


def plan(forms: tuple[Callable[..., Tensor], Callable[..., Tensor]], **kwargs: Any) -> Any:
    network = nn.Sequential(nn.Conv2d(C, C, 1), Parent(*forms), Plain())
    return plan_se(network, example_input=torch.randn(2, C, 8, 8), **kwargs)


@pytest.mark.parametrize("name", GATED)
def test_a_branch_that_the_callers_gate_scales_is_gated(name: str) -> None:
    found = plan(GATED[name])
    assert [site.block for site in found.sites] == ["2"]
    assert [(s.block, s.reason) for s in found.skipped] == [("1.child", Reason.GATED)]


@pytest.mark.parametrize("name", NOT_GATED)
def test_what_else_a_caller_gives_is_no_gate(name: str) -> None:
    assert [site.block for site in plan(NOT_GATED[name]).sites] == ["1.child", "2"]


def test_every_placement_sees_the_callers_gate() -> None:
    assert [s.block for s in plan(GATED["times"], placement="pre").sites] == ["2"]
