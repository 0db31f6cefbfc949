"""Old ways of making tensors and numbers, in the forward of a block itself."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from blocks import Unit, X
from torch import Tensor, nn
from torch.autograd import Variable

from se_inject import inject_se, plan_se

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and in many people's code

    @torch.jit.script
    def swish(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @torch.jit.script
    def first_channels(x: Tensor, n: int) -> Tensor:
        return x.narrow(1, 0, n)


class Block(Unit):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, self.norm(self.conv(x)))


def asks_its_type(x: Tensor, y: Tensor) -> Tensor:
    return x + y if isinstance(x, torch.Tensor) and type(x) is torch.Tensor else x - y


def padded(x: Tensor, y: Tensor) -> Tensor:
    zeros = Variable(torch.Tensor(x.size(0), 4, x.size(2), x.size(3)).zero_())
    return torch.cat([x[:, :12], zeros], 1) + y


def by_unbound_method(x: Tensor, y: Tensor) -> Tensor:
    return x + torch.Tensor.mul(y, 0.5)


# Each works at any size after the injection, as before.
FREE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Tensor of sizes": lambda x, y: x + y * torch.Tensor(*x.shape).fill_(0.5),
    "Tensor of a size": lambda x, y: x + y * torch.Tensor(x.size()).fill_(0.5),
    "Tensor of numbers": lambda x, y: x + y * torch.Tensor([0.5]),
    "FloatTensor": lambda x, y: x + y + torch.FloatTensor(x.size(0), 16, 1, 1).fill_(0.5),
    "LongTensor": lambda x, y: x + y[:, torch.LongTensor([*range(15, -1, -1)])],
    "new": lambda x, y: x + y + x.new(x.size()).fill_(0.5),
    "type_as": lambda x, y: x + torch.full(x.shape, 0.5).type_as(x) + y,
    "Variable": lambda x, y: x + Variable(y),
    "padded by a Variable": padded,
    "isinstance": asks_its_type,
    "unbound method": by_unbound_method,
    "script": lambda x, y: x + swish(y),
    "script with a size": lambda x, y: x + first_channels(y, x.shape[1]),
    "math.sqrt": lambda x, y: x + y / math.sqrt(x.shape[2] * x.shape[3]),
    "math.log2": lambda x, y: x + y * math.log2(x.shape[2]),
    "max": lambda x, y: x + y / max(x.shape[1], 1),
    "np.sqrt of channels": lambda x, y: x + y / numpy.sqrt(x.shape[1]),
}


@pytest.mark.parametrize("name", FREE)
def test_old_code_is_served_and_stays_free_in_its_sizes(name: str) -> None:
    base = Block(FREE[name]).eval()
    module = inject_se(copy.deepcopy(base), example_input=X)
    for shape in ((2, 16, 8, 8), (3, 16, 12, 6)):
        x, again = (torch.ones(shape, requires_grad=True) for _ in range(2))
        want, got = base(x), module(again)
        assert torch.equal(got, want)
        want.sum().backward()
        got.sum().backward()
        assert torch.equal(x.grad, again.grad)
    assert isinstance(module._function, type(base._function))


# These ask Python for a number, which a graph then checks.
CHECKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int": lambda x, y: x + y * int(x.shape[2] * 0.5),
    "float": lambda x, y: x + y / float(x.shape[2]),
    "np.sqrt": lambda x, y: x + y / numpy.sqrt(x.shape[2]),
    "side of a square": lambda x, y: (
        x + y.view(*x.shape[:2], -1).view(*x.shape[:2], int(math.sqrt(x.shape[2] * x.shape[3])), -1)
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_what_python_must_know_is_checked_in_words(name: str) -> None:
    base = Block(CHECKED[name]).eval()
    module = inject_se(copy.deepcopy(base), example_input=X)
    x = torch.randn(3, 16, 8, 8)
    assert torch.equal(module(x), base(x))
    with pytest.raises(RuntimeError, match=r"`.*x\.shape\[2\].*` was .* when the SE block was ins"):
        module(torch.randn(2, 16, 16, 16))


def test_a_block_that_calls_a_script_function_pickles() -> None:
    module = inject_se(nn.Sequential(Scripted()), example_input=X)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).eval()(X), module.eval()(X))


class Scripted(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return x + swish(self.norm(self.conv(x)))


def test_a_script_function_without_a_name_is_refused_in_words() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = torch.jit.script(lambda_like)
    network = nn.Sequential(Block(lambda x, y: x + function(y)), Scripted())
    plan = plan_se(network, example_input=X)
    assert [site.block for site in plan.sites] == ["1"]
    assert "no module has a name for" in plan.skipped[0].detail


def lambda_like(x: Tensor) -> Tensor:
    return x * 2.0


def test_the_name_torch_is_as_it_was() -> None:
    inject_se(Block(FREE["Tensor of sizes"]), example_input=X)
    assert globals()["torch"] is torch
    assert type(torch).__name__ == "module"
    assert isinstance(X, torch.Tensor)


def test_calls_with_other_types_are_no_constructors() -> None:
    values: list[Any] = []

    def notes(x: Tensor, y: Tensor) -> Tensor:
        values.append(torch.Tensor)
        return x + y

    inject_se(Block(notes), example_input=X)
    assert all(value is torch.Tensor for value in values)
