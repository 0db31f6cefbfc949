"""A plan is the same under profilers and modes, and whatever a forward does to compute its map."""

import cProfile
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from se_inject import ForwardError, inject_se, plan_se
from se_inject.graph.copies import meta_copy
from se_inject.graph.operations import shortcuts

X = torch.randn(2, 3, 16, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Net(nn.Module):
    def __init__(self, block: nn.Module, first: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.stem, self.plain, self.block = nn.Conv2d(3, 8, 3), Block(), block
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.plain(self.first(self.stem(x))))


def blocks_of(model: nn.Module) -> list[str]:
    return [site.block for site in plan_se(model, example_input=X, r=2, divisor=1).sites]


class WithFlag(Block):
    def forward(self, x: Tensor, flag: bool = True) -> Tensor:
        return super().forward(x)


class WithText(Block):
    def forward(self, x: Tensor, mode: str = "a", *rest: Tensor, **more: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("block", [Block, WithFlag, WithText])
def test_under_a_profiler_written_in_c(block: type[nn.Module]) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        assert blocks_of(Net(block())) == ["plain", "block"]
    finally:
        profiler.disable()


@pytest.mark.parametrize("block", [Block, WithFlag, WithText])
def test_under_a_profile_function(block: type[nn.Module]) -> None:
    def see(*_: Any) -> None: ...

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        assert blocks_of(Net(block())) == ["plain", "block"]
        assert sys.getprofile() is see
    finally:
        sys.setprofile(before)


class Widens(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.seen += func is F.interpolate
        return out.double() if func is F.interpolate else out


def resized(x: Tensor) -> Tensor:
    y = F.interpolate(x, scale_factor=2.0)
    assert y.dtype == torch.float32, y.dtype
    return F.avg_pool2d(y, 2)


def test_nothing_is_remembered_of_a_mode_of_the_users() -> None:
    for _ in range(2):
        with Widens() as mode, pytest.raises(ForwardError, match=r"torch\.float64"):
            plan_se(Net(Block(), resized), example_input=X)
        assert mode.seen
        assert blocks_of(Net(Block(), resized)) == ["plain", "block"]


def tangent(x: Tensor) -> Tensor:
    with fwad.dual_level():
        dual = fwad.make_dual(x, torch.ones_like(x))
        return x * fwad.unpack_dual(dual * 2.0).tangent


def gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad((y * 2.0).sum(), y)
    return x * grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of torch's forward AD
@pytest.mark.parametrize("first", [tangent, gradient])
def test_derivatives_in_a_forward(first: Callable[[Tensor], Tensor]) -> None:
    assert blocks_of(Net(Block(), first)) == ["plain", "block"]
    assert blocks_of(Net(Block(), first)) == ["plain", "block"]


class Compiles(Block):
    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.compile(lambda t: torch.matmul(t, t.mT).mean() * t, backend="eager")
        return x + scaled(self.conv(x))


def test_what_dynamo_reads_of_a_forward_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shortcuts, "_REMEMBERED", {})
    torch._dynamo.reset()
    model = Net(nn.Sequential(Compiles(), Compiles())).eval()
    plan = plan_se(model, example_input=X, r=2, divisor=1)
    assert [site.block for site in plan.sites] == ["plain"]
    assert [entry.block for entry in plan.skipped] == ["block.0", "block.1"]


class CallsAKernel(Block):
    """Torch's kernels in Python are its own code: the tracer does not look into them."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch._refs.softmax(self.conv(x), 1)


def test_what_planning_asks_for_itself_is_no_reason() -> None:
    plan = plan_se(Net(CallsAKernel()), example_input=X, r=2, divisor=1)
    (skipped,) = plan.skipped
    assert "not made by a function of torch" in skipped.detail


class Tokens(Net):
    """``view`` asks for the strides of the parameter."""

    def __init__(self) -> None:
        super().__init__(Block())
        self.token = nn.Parameter(torch.zeros(2, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token] * 16, 1).permute(0, 2, 3, 1).view(-1, 16)
        return super().forward(x) + tokens.sum()


def test_strides_of_dims_of_one_entry_are_kept() -> None:
    model = Tokens().to(memory_format=torch.channels_last)
    x = X.to(memory_format=torch.channels_last)
    before = model(x)
    assert torch.equal(inject_se(model, 2, divisor=1, example_input=x)(x), before)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 1, 8, 8).to(memory_format=torch.channels_last),
        torch.zeros(8, 4, 1, 1).to(memory_format=torch.channels_last),
        torch.zeros(1, 7)[:, :4],
        torch.zeros(3, 4).T,
        torch.zeros(0, 3),
        torch.zeros(()),
    ],
    ids=lambda t: f"{list(t.shape)}, {t.stride()}",
)
def test_a_copy_on_meta_lies_in_memory_as_the_tensor(tensor: Tensor) -> None:
    module = nn.Module()
    module.register_buffer("kept", tensor)
    copied = meta_copy(module).kept
    assert (copied.shape, copied.stride(), copied.dtype) == (
        *(tensor.shape, tensor.stride()),
        tensor.dtype,
    )
    assert copied.is_meta
