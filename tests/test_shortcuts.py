"""The shortcuts on meta give what torch computes there: shape, strides and dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from se_inject.graph.operations.shortcuts import shortcut


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


MAP, TOKENS, HEADS = meta(2, 8, 5, 3), meta(2, 5, 8), meta(2, 3, 5, 8)
LAST = MAP.to(memory_format=torch.channels_last)
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
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


@pytest.mark.parametrize("name", CALLS)
def test_a_shortcut_gives_what_torch_gives(name: str) -> None:
    func, args, kwargs = CALLS[name]
    found, expected = shortcut(func, args, kwargs), func(*args, **kwargs)
    assert found is not None
    assert (found.shape, found.stride(), found.dtype, found.device) == (
        *(expected.shape, expected.stride()),
        *(expected.dtype, expected.device),
    )


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (F.linear, (TOKENS, meta(4, 7))),
        (F.linear, (TOKENS, meta(8))),
        (F.linear, (TOKENS.half(), meta(4, 8))),
        (F.linear, (TOKENS, meta(4, 8), meta(5))),
        (F.linear, (torch.ones(2, 8), torch.ones(4, 8))),
        (F.scaled_dot_product_attention, (HEADS, meta(2, 3, 5, 7), HEADS)),
        (F.scaled_dot_product_attention, (HEADS, HEADS, HEADS.half())),
        (F.scaled_dot_product_attention, (HEADS[0], HEADS[0], HEADS[0])),
        (torch.add, (MAP, meta(2, 8, 5, 4))),
        (F.relu, (meta(2, dtype=torch.int64),)),
    ],
)
def test_torch_itself_takes_what_is_unusual_or_wrong(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    assert shortcut(func, args, {}) is None


def test_a_counter_of_flops_sees_the_products() -> None:
    with FlopCounterMode(display=False):
        assert shortcut(F.linear, (TOKENS, meta(4, 8)), {}) is None
