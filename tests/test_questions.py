"""What a forward asks of its sizes, numbers and devices: answered, checked or refused."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import Root, Unit, X, same_before_and_after
from torch import Tensor, nn
from torch.autograd import Variable

from se_inject import SEInjectError, inject_se, plan_se


class Body(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"if": nn.Conv2d(16, 16, 1), "for": nn.Identity()})
        self.device = torch.device("cpu")

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def block(forward: Callable[..., Any]) -> nn.Module:
    return type(forward.__name__, (Body,), {"forward": forward})()


# --- served: the answer follows from the recorded sizes ------------------------------------------


def asserts_channels(self: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 16, "channels"
    return x + self.body(x)


def compares_shapes(self: Any, x: Tensor) -> Tensor:
    out = self.body(x)
    if out.shape != x.shape or out.size() != x.size():
        raise ValueError("shapes")
    return x + out


def asks_parity(self: Any, x: Tensor) -> Tensor:
    h = x.shape[2]
    if h % 2:
        x = F.pad(x, (0, 0, 0, 1))
    return x + self.body(x)


def asks_rank(self: Any, x: Tensor) -> Tensor:
    if x.dim() == x.ndim == 4 and len(x.shape) == len(x.size()) == 4:
        return x + self.body(x)
    return x


def asks_type(self: Any, x: Tensor) -> Tensor:
    if not isinstance(x, torch.Tensor) or not torch.is_tensor(x):
        raise TypeError
    return x + self.body(x)


def float_of_size(self: Any, x: Tensor) -> Tensor:
    return x + self.body(x) / float(x.shape[1]) * x.shape[1] ** -0.5


def unpacks_and_checks(self: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    assert h >= 2 <= w
    assert n * c > 0
    return x + self.body(x).view(n, c, h * w).reshape(n, c, h, w)


def fresh_relu(self: Any, x: Tensor) -> Tensor:
    return nn.ReLU(inplace=True)(x + self.body(nn.ReLU()(x)))


def fresh_pool(self: Any, x: Tensor) -> Tensor:
    return x + nn.AvgPool2d(3, stride=1, padding=1)(self.body(x))


def fresh_dropout(self: Any, x: Tensor) -> Tensor:
    return x + nn.Dropout2d(0.5).train(self.training)(self.body(x))


def as_tensor(self: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(x) + self.body(x)


def dead_reads(self: Any, x: Tensor) -> Tensor:
    _ = x.data, x.shape, x.dtype, x.device, x.requires_grad, self.conv.weight.data
    return x + self.body(x)


def star_of_shape(self: Any, x: Tensor) -> Tensor:
    return x + self.body(x).reshape(x.shape[0], 16, *x.shape[2:])


def splits(self: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    parts = list(torch.tensor_split(torch.cat([a, b], 1), 4, 1))
    return x + self.body(torch.cat([*parts[::-1], *x.split(8, 1)][:4], 1))


def split_of_size(self: Any, x: Tensor) -> Tensor:
    c = x.shape[1] // 2
    first, second = x.split([c, x.size(1) - c], dim=1)
    return x + self.body(torch.cat([second, first], 1))


def keyword_keys(self: Any, x: Tensor) -> Tensor:
    return x + self.branches["for"](self.branches["if"](x))


def fresh_tensors(self: Any, x: Tensor) -> Tensor:
    n, _, h, _ = x.shape
    mask = torch.zeros(n, 1, h, x.size(3), dtype=x.dtype, device=x.device) + torch.ones_like(x[:1])
    ramp = torch.arange(h, device=x.device, dtype=x.dtype).view(1, 1, -1, 1)
    return x + self.body(x) * mask * ramp + x.new_zeros(n, 1, 1, 1)


def sizes_of_float_math(self: Any, x: Tensor) -> Tensor:
    h = math.ceil(x.shape[2] / 2) * 2
    return x + F.interpolate(self.body(x), size=(h, round(x.shape[3] * 1.0)))


def loops_over_sizes(self: Any, x: Tensor) -> Tensor:
    out = self.body(x)
    for i in range(x.shape[1] // 8):
        out = out + i * self.body(x)
    return x + out


def moves(self: Any, x: Tensor) -> Tensor:
    w = next(self.parameters())
    return x + self.body(x.to(w.device).to(w.dtype).type_as(w).to(self.device))


def asserts_floats(self: Any, x: Tensor) -> Tensor:
    assert torch.is_floating_point(x)
    assert x.is_floating_point()
    assert not x.is_complex()
    assert x.device == self.conv.weight.device
    return x + self.body(x)


SERVED = [
    asserts_channels, compares_shapes, asks_parity, asks_rank, asks_type, float_of_size,
    unpacks_and_checks, fresh_relu, fresh_pool, fresh_dropout, as_tensor, dead_reads,
    star_of_shape, splits, split_of_size, keyword_keys, fresh_tensors, sizes_of_float_math,
    loops_over_sizes, moves, asserts_floats,
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("forward", SERVED, ids=lambda f: f.__name__)
def test_what_the_recorded_call_answers_is_served(
    forward: Callable[..., Any], training: bool
) -> None:
    root = Root(block(forward))
    assert "block" in same_before_and_after(root, training)


@pytest.mark.parametrize(
    "forward", [f for f in SERVED if f is not loops_over_sizes], ids=lambda f: f.__name__
)
def test_batch_and_space_stay_free(forward: Callable[..., Any]) -> None:
    module = block(forward).eval()
    x = torch.randn(3, 16, 12, 6)
    before = module(x.clone())
    inject_se(module, example_input=X)
    assert torch.equal(module(x.clone()), before)


@pytest.mark.parametrize(
    ("forward", "x", "question"),
    [
        (asks_parity, X[:, :, 1:], r"x\.shape\[2\] % 2"),
        (unpacks_and_checks, X[:, :, :1], r"x\.shape\[2\] >= 2"),
    ],
)
def test_another_answer_is_an_error_that_names_the_question(
    forward: Callable[..., Any], x: Tensor, question: str
) -> None:
    module = inject_se(block(forward), example_input=X)
    with pytest.raises(RuntimeError, match=f"`{question}` was .* remove_se"):
        module(x)


def test_number_arguments_are_asked_for_their_truth_alone() -> None:
    def rate(self: Any, x: Tensor, rate: float = 0.0) -> Tensor:
        out = self.body(x)
        if rate:
            out = F.dropout(out, rate, self.training)
        return x + out

    root = Root(block(rate), lambda b, x: b(x, rate=0.1))
    assert "block" in same_before_and_after(root, training=True)
    root.block(X, rate=0.3)
    with pytest.raises(RuntimeError, match="`rate` was True"):
        root.block(X, rate=0.0)


def test_a_question_that_two_calls_answer_differently_refuses_the_block() -> None:
    root = Root(block(asks_parity), lambda b, x: b(x)[..., :7, :] + b(x[:, :, 1:])[..., :7, :])
    plan = plan_se(root, example_input=X)
    assert [s.block for s in plan.sites] == ["plain"]


# --- refused: another device or mode would have another answer -----------------------------------


def by_device(self: Any, x: Tensor) -> Tensor:
    return x + (0.5 if x.device.type == "cpu" else 1.0) * self.body(x)


def by_device_of_weights(self: Any, x: Tensor) -> Tensor:
    return x + (0.5 if next(self.parameters()).device.type == "cpu" else 1.0) * self.body(x)


def by_is_cuda(self: Any, x: Tensor) -> Tensor:
    return x + (1.0 if x.is_cuda else 0.5) * self.body(x)


def by_is_meta(self: Any, x: Tensor) -> Tensor:
    return x + (1.0 if self.conv.weight.is_meta else 0.5) * self.body(x)


def by_type_name(self: Any, x: Tensor) -> Tensor:
    return x + (0.5 if x.type() == "torch.FloatTensor" else 1.0) * self.body(x)


def by_legacy_type(self: Any, x: Tensor) -> Tensor:
    return x + (0.5 if isinstance(x, torch.FloatTensor) else 1.0) * self.body(x)


def by_get_device(self: Any, x: Tensor) -> Tensor:
    return x + (0.5 if x.get_device() < 0 else 1.0) * self.body(x)


def by_data_ptr(self: Any, x: Tensor) -> Tensor:
    return x + (0.5 if x.data_ptr() else 1.0) * self.body(x)


def by_dtype(self: Any, x: Tensor) -> Tensor:
    return x + (0.5 if x.dtype == torch.float32 else 1.0) * self.body(x)


def by_dtype_in_a_dict(self: Any, x: Tensor) -> Tensor:
    return x + {torch.float32: 0.5}.get(x.dtype, 1.0) * self.body(x)


def by_autocast(self: Any, x: Tensor) -> Tensor:
    return x + (1.0 if torch.is_autocast_enabled("cpu") else 0.5) * self.body(x)


def by_inference_mode(self: Any, x: Tensor) -> Tensor:
    return x + (1.0 if torch.is_inference_mode_enabled() else 0.5) * self.body(x)


def by_grad_mode(self: Any, x: Tensor) -> Tensor:
    return x + (1.0 if torch.is_grad_enabled() else 0.5) * self.body(x)


def by_value(self: Any, x: Tensor) -> Tensor:
    return x + self.body(x) * len(x.tolist())


REFUSED = {
    by_device: "takes its way by the device",
    by_device_of_weights: "takes its way by the device",
    by_is_cuda: "takes its way by",
    by_is_meta: "takes its way by",
    by_type_name: "takes its way by",
    by_legacy_type: "torch.FloatTensor",
    by_get_device: "takes its way by the device",
    by_data_ptr: "takes its way by the memory",
    by_dtype: "takes its way by the dtype",
    by_dtype_in_a_dict: "takes its way by the dtype",
    by_autocast: "asks whether autocast is on",
    by_inference_mode: "asks whether inference mode is on",
    by_grad_mode: "asks whether gradient mode is on",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_another_device_or_mode_would_answer_otherwise_is_refused(
    forward: Callable[..., Any],
) -> None:
    root = Root(block(forward))
    assert same_before_and_after(root) == ["plain"]
    (skipped,) = plan_se(Root(block(forward)), example_input=X).skipped
    assert REFUSED[forward] in skipped.detail
    assert "test_questions.py, line" in skipped.detail


@pytest.mark.parametrize("forward", [moves, fresh_tensors, dead_reads], ids=lambda f: f.__name__)
def test_a_model_can_be_moved_and_cast_after_injection(forward: Callable[..., Any]) -> None:
    module, base = (block(forward).eval() for _ in range(2))
    base.load_state_dict(module.state_dict())
    inject_se(module, example_input=X)
    x = X.double()
    assert torch.equal(module.double()(x), base.double()(x))
    if forward is not moves:
        meta = module.to("meta")(x.to("meta"))
        assert meta.device.type == "meta"
    text = module.forward.__func__.__code__.co_consts
    assert "meta" not in text


# --- on the way: not in a block ------------------------------------------------------------------


class OnTheWay(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self._do = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._do(x)


def scripted(x: Tensor) -> Tensor:
    return x * 2


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and in many people's code
    scripted = torch.jit.script(scripted)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "legacy Tensor": lambda x: x * torch.Tensor(*x.shape).fill_(1),
    "FloatTensor": lambda x: x + torch.FloatTensor(x.shape[0], 1, 1, 1).zero_(),
    "Variable": lambda x: Variable(x) * 2,
    "jit.script": scripted,
    "cpu": lambda x: x.cpu() * 2 if not x.is_cuda else x,
    "item free": lambda x: x.to("cpu") * 3,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_rest_is_served_behind_old_and_odd_functions(way: str) -> None:
    root = nn.Sequential(OnTheWay(WAYS[way]), Root(block(asserts_channels)))
    assert same_before_and_after(root) == ["1.plain", "1.block"]


def test_an_injected_block_with_checks_compiles_and_exports() -> None:
    module = block(compares_shapes).eval()
    del module.branches  # torch.export itself fails at its keys
    inject_se(module, example_input=X)
    program = torch.export.export(module, (X,))
    torch.testing.assert_close(program.module()(X), module(X))


def test_a_device_error_is_ours() -> None:
    with pytest.raises(SEInjectError, match="takes its way by the device"):
        inject_se(block(by_device), example_input=X)


class Sneaky(Body):
    """Asks for the type of its input in a way that nobody sees, outside of its own source."""

    def forward(self, x: Tensor) -> Tensor:
        return x + sneaky_gain(x) * self.body(x)


def sneaky_gain(x: Tensor, kind: Any = torch.FloatTensor) -> float:
    return 0.5 if isinstance(x, kind) else 1.0


def test_a_check_on_real_tensors_sees_what_nothing_else_sees() -> None:
    root = Root(Sneaky()).eval()
    keys, before = list(root.state_dict()), root(X)
    state = torch.get_rng_state()
    with pytest.raises(
        SEInjectError, match=r"'block' would compute something else.*exclude='block'"
    ):
        inject_se(root, example_input=X)
    assert list(root.state_dict()) == keys
    assert torch.equal(root(X), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inject_se(root, example_input=X, exclude="block")(X), before)


def test_the_check_runs_no_hook_and_moves_no_statistics() -> None:
    root = Root(block(fresh_dropout)).train()
    seen: list[int] = []
    root.block.norm.register_forward_hook(lambda *_: seen.append(1))
    inject_se(root, example_input=X)
    assert not seen
    assert root.block.norm.num_batches_tracked == 0


def test_a_gate_is_named_even_where_the_block_cannot_be_traced() -> None:
    def gated(self: Any, x: Tensor) -> Tensor:
        out = self.body(x)
        out = out * torch.sigmoid(self.conv(F.adaptive_avg_pool2d(out, 1)))
        return x + (0.5 if x.is_cuda else 1.0) * out

    plan = plan_se(Root(block(gated)), example_input=X)
    ((skipped),) = plan.skipped
    assert (skipped.block, skipped.reason) == ("block", "the branch already has channel attention")
    assert not plan.gaps
