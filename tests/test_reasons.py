"""What is said of a block that cannot be served: in words, with the line, and what to do."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from blocks import Root, X
from torch import Tensor, nn

from se_inject import NoSiteError, plan_se
from se_inject.reasons import Reason, Skipped

# What torch and Python say, and nobody who uses a network can do anything with.
RAW = re.compile(r"Proxy|control flow|not supported|aten|object|Error:|NoneType|meta tensor|'Int'")


class Excite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Block(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.se = Excite()
        self._do = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._do(self, x)


def skipped(forward: Callable[..., Any]) -> list[Skipped]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what meta tensors cannot answer
        return list(plan_se(Root(Block(forward)), example_input=X).skipped)


def by_values(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return x + (y if y.mean() > 0 else -y)


def by_dtype(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) * (1.0 if x.dtype == torch.float32 else 0.5)


def remembers(self: Any, x: Tensor) -> Tensor:
    self.last = self.conv(x)
    return x + self.last


def in_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x + self.conv(x)


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 1
    return y + self.conv(x)


ONES = numpy.ones((1,), dtype="float32")


def from_numpy(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) + torch.from_numpy(ONES)


UNTRACED = [by_values, by_dtype, remembers, in_autocast, without_gradients]
UNTRACED += [from_numpy]


@pytest.mark.parametrize("forward", UNTRACED, ids=lambda f: f.__name__)
def test_a_reason_names_the_line_and_says_what_to_do(forward: Callable[..., Any]) -> None:
    entries = [entry for entry in skipped(forward) if entry.reason == Reason.UNTRACED]
    assert entries
    for entry in entries:
        assert not RAW.search(entry.detail), entry.detail
        what, _, instead = entry.detail.partition("; ")
        assert what.startswith("its forward ")
        assert instead
        if forward is not remembers:
            assert re.search(r"\(test_reasons\.py, line \d+: .+\)", what), what


def gated_by_dtype(self: Any, x: Tensor) -> Tensor:
    y = self.se(self.norm(self.conv(x)))
    return x + y if x.dtype == torch.float32 else x - y


def gated_then_noted(self: Any, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    self.gate = torch.sigmoid(self.se.fc(y.mean((2, 3), keepdim=True)))
    return y * self.gate + x


def gated_after(self: Any, x: Tensor) -> Tensor:
    y = x + self.norm(self.conv(x))
    return self.se(y) if x.dtype == torch.float32 else y


def gated_before(self: Any, x: Tensor) -> Tensor:
    x = self.se(x)
    return x + self.norm(self.conv(x)) * (1.0 if x.dtype == torch.float32 else 0.5)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (gated_by_dtype, Reason.GATED),
        (gated_then_noted, Reason.GATED),
        (gated_after, Reason.UNTRACED),
        (gated_before, Reason.UNTRACED),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_gate_on_the_branch_is_seen_where_the_block_cannot_be_traced(
    forward: Callable[..., Any], reason: Reason
) -> None:
    assert [entry.reason for entry in skipped(forward)] == [reason]


class AddsByDtype(nn.Module):
    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.relu(y + x) if x.dtype == torch.float32 else y - x


class GateInTheParent(nn.Module):
    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.se = Excite() if gated else nn.Identity()
        self.out = nn.Sequential(nn.Conv2d(16, 16, 1))
        self.add = AddsByDtype()

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.se(self.norm(self.conv(x))))
        return self.add(y, x) * 2


@pytest.mark.parametrize("gated", [True, False])
def test_a_gate_of_the_parent_is_seen_where_the_child_that_adds_cannot_be_traced(
    gated: bool,
) -> None:
    with pytest.raises(NoSiteError) as caught:
        plan_se(nn.Sequential(GateInTheParent(gated=gated)), example_input=X)
    assert [entry.reason == Reason.GATED for entry in caught.value.skipped] == [gated]


def sums_what_is_positive(x: Tensor) -> Tensor:
    return x[x > 0].sum() + x


def through_numpy(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().mean())


def through_a_list(x: Tensor) -> Tensor:
    return x * len(x.tolist())


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


@pytest.mark.parametrize("function", [sums_what_is_positive, through_numpy, through_a_list])
def test_a_forward_that_stops_says_at_which_line(function: Callable[[Tensor], Tensor]) -> None:
    block = Block(lambda self, x: x + self.norm(self.conv(x)))
    entries = plan_se(nn.Sequential(block, Calls(function)), example_input=X).skipped
    (entry,) = [entry for entry in entries if entry.reason == Reason.NOT_REACHED]
    assert not RAW.search(entry.detail)
    assert re.search(r"\(test_reasons\.py, line \d+: return x", entry.detail)
