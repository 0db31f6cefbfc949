"""The shortcuts on meta give what torch computes there: shapes, strides and dtypes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from se_inject.graph.operations import shortcuts
from se_inject.graph.operations.shortcuts import run_on_meta


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """Nothing at first. Plans are made without gradients, too."""
    empty: dict[Any, Any] = {}
    monkeypatch.setattr(shortcuts, "_REMEMBERED", empty)
    with torch.no_grad():
        yield empty


LSTM = torch.nn.LSTM(8, 4, bidirectional=True, batch_first=True, device="meta")
MAP, TOKENS, HEADS = meta(2, 8, 5, 3), meta(2, 5, 8), meta(2, 3, 5, 8)
LAST = MAP.to(memory_format=torch.channels_last)
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "convolution": (torch.conv2d, (LAST, meta(4, 8, 3, 3), None, 2, 1), {}),
    "convolution of a part": (torch.conv2d, (MAP[:, ::2], meta(4, 4, 3, 3)), {}),
    "resizing": (F.interpolate, (MAP,), {"scale_factor": 2.0, "mode": "bilinear"}),
    "sampling": (F.grid_sample, (MAP, meta(2, 4, 4, 2)), {"align_corners": False}),
    "mean": (Tensor.mean, (LAST, (2, 3)), {"keepdim": True}),
    "concatenation": (torch.cat, ([MAP, MAP], 1), {}),
    "norm of vectors": (F.normalize, (TOKENS,), {"dim": -1}),
    "padding": (F.pad, (LAST, (1, 0, 0, 1)), {}),
    "product of matrices": (torch.matmul, (HEADS, HEADS.mT), {}),
    "whole numbers": (torch.add, (meta(3, dtype=torch.int64), 1), {}),
    "whole numbers and another": (torch.add, (meta(3, dtype=torch.int64), 1.0), {}),
    "another dtype": (torch.mul, (MAP, MAP.half()), {}),
    "recurrent": (
        torch.lstm,
        (TOKENS, (meta(2, 2, 4), meta(2, 2, 4)), LSTM._flat_weights, True, 1, 0.0, False),
        {"bidirectional": True, "batch_first": True},
    ),
    "batch norm": (F.batch_norm, (MAP, meta(8), meta(8)), {}),
    "layer norm": (F.layer_norm, (TOKENS, [8]), {}),
    "relu": (F.relu, (LAST,), {}),
    "hardswish": (F.hardswish, (LAST,), {}),
    "gelu": (F.gelu, (TOKENS,), {}),
    "sum": (torch.add, (MAP, MAP), {}),
    "gate": (torch.mul, (MAP, meta(2, 8, 1, 1)), {}),
    "linear": (F.linear, (TOKENS, meta(4, 8)), {}),
    "linear with bias": (F.linear, (meta(2, 8), meta(4, 8), meta(4)), {}),
    "linear by keywords": (F.linear, (TOKENS, meta(4, 8)), {"bias": meta(4)}),
    "linear on channels last": (F.linear, (LAST.permute(0, 2, 3, 1), meta(4, 8), meta(4)), {}),
    "linear on a transposed map": (F.linear, (MAP.permute(0, 2, 3, 1), meta(4, 8)), {}),
    "attention": (F.scaled_dot_product_attention, (HEADS, HEADS, HEADS), {}),
    "cross attention": (
        F.scaled_dot_product_attention,
        (HEADS, meta(2, 3, 7, 8), meta(2, 3, 7, 8)),
        {"attn_mask": meta(5, 7), "dropout_p": 0.1},
    ),
    "attention on transposed heads": (
        F.scaled_dot_product_attention,
        (meta(2, 5, 3, 8).transpose(1, 2),) * 3,
        {},
    ),
}


def described(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(described, value))
    return value.shape, value.stride(), value.dtype, value.device


@pytest.mark.parametrize("name", CALLS)
def test_a_shortcut_gives_what_torch_gives(name: str, remembered: dict[Any, Any]) -> None:
    func, args, kwargs = CALLS[name]
    expected = described(func(*args, **kwargs))
    first, second = run_on_meta(func, args, kwargs), run_on_meta(func, args, kwargs)
    assert described(first) == described(second) == expected
    assert first is not second
    assert len(remembered) == (func not in shortcuts._LIKE_INPUT)


def test_what_is_remembered_is_not_computed_again(remembered: dict[Any, Any]) -> None:
    run_on_meta(torch.add, (MAP, MAP), {})
    (key,) = remembered
    remembered[key] = ((7, 7), (7, 1), torch.float64)
    assert described(run_on_meta(torch.add, (MAP, MAP), {}))[:3] == remembered[key]


def test_numbers_that_are_equal_are_not_the_same(remembered: dict[Any, Any]) -> None:
    whole = meta(3, dtype=torch.int64)
    made = [run_on_meta(torch.mul, (whole, number), {}).dtype for number in (1, 1.0, True)]
    assert made == [torch.int64, torch.float32, torch.int64]
    assert len(remembered) == 3


def test_the_default_dtype_counts() -> None:
    whole = meta(3, dtype=torch.int64)
    before = torch.get_default_dtype()
    made = [run_on_meta(torch.mul, (whole, 0.5), {}).dtype]
    try:
        torch.set_default_dtype(torch.float64)
        made.append(run_on_meta(torch.mul, (whole, 0.5), {}).dtype)
    finally:
        torch.set_default_dtype(before)
    assert made == [torch.float32, torch.float64]


class Own(Tensor):
    """A type of tensors that nothing is known about."""


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.add, (torch.ones(2), torch.ones(2))),
        (torch.add, (MAP.as_subclass(Own), MAP)),
        (torch.einsum, ("nchw->ncwh", MAP)),  # a part of what it was given
        (Tensor.add_, (meta(3), meta(3))),
        (torch.view_as_real, (meta(3, dtype=torch.complex64),)),
        (torch.mul, (meta(3, dtype=torch.complex64), meta(3))),
    ],
)
def test_torch_itself_computes_what_is_unusual(
    func: Callable[..., Any], args: tuple[Any, ...], remembered: dict[Any, Any]
) -> None:
    for _ in range(2):
        assert described(run_on_meta(func, args, {})) == described(func(*args))
    assert not remembered


def test_a_wrong_call_fails_again_and_again() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError):
            run_on_meta(F.linear, (TOKENS, meta(4, 7)), {})


def test_in_place_and_out_are_never_remembered(remembered: dict[Any, Any]) -> None:
    x, out = meta(3), meta(3)
    assert run_on_meta(F.relu, (x, True), {}) is x
    assert run_on_meta(torch.add, (x, x), {"out": out}) is out
    assert not remembered


def test_somebody_who_looks_sees_the_functions_themselves(remembered: dict[Any, Any]) -> None:
    def product() -> Tensor:
        return run_on_meta(F.linear, (TOKENS, meta(4, 8)), {})

    product()
    with FlopCounterMode(display=False) as counter:
        product()
    assert counter.get_total_flops() == 2 * 10 * 8 * 4
    weight = meta(4, 8).requires_grad_()
    with torch.enable_grad():
        assert run_on_meta(F.linear, (TOKENS, weight), {}).requires_grad
    stack = torch.vmap(lambda x: run_on_meta(F.linear, (x, meta(4, 8)), {}))(meta(5, 2, 5, 8))
    assert stack.shape == (5, 2, 5, 4)
    assert len(remembered) == 1


def test_the_memory_is_bounded(remembered: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "_MOST", 3)
    for n in range(1, 9):
        run_on_meta(torch.add, (meta(n), meta(n)), {})
        assert len(remembered) <= 3
