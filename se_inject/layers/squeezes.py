"""The paper's squeezes (Tables 11, 16). A new one needs a row and its name in the ``Literal``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

Squeeze = Literal["avg", "max", "none"]


@dataclass(frozen=True)
class SqueezeFunction:
    """What the two layers see of a map, and how often they run."""

    of: Callable[[Tensor, list[int]], Tensor]  # takes the map and the dims of its space
    plain: Callable[[Tensor, list[int]], Tensor]  # the same as one operation that converters know
    pools: bool  # whether it leaves one position; otherwise the layers run at every position


@fx.wrap
def _sum_over_n(x: Tensor, space: list[int]) -> Tensor:
    """The mean, as sum / n where autograd records: its gradient is a view, a mean's fills a map.

    The dtype is named because CUDA's autocast would otherwise make the sum float32, and its
    gradient, cast back, would fill a map after all. The function is a leaf of
    ``fx.symbolic_trace``, because a tracer knows no dtype.
    """
    if x.dtype == torch.float16:  # a sum of float16 values could overflow
        return x.mean(space, keepdim=True)
    n = 1
    for dim in space:
        n *= x.shape[dim]
    # Under jit.trace n is a tensor, and jit.script cannot name an overload.
    if torch.jit.is_scripting() or torch.jit.is_tracing():  # type: ignore
        return x.sum(space, keepdim=True, dtype=x.dtype) / n
    if not torch.is_grad_enabled():
        return x.mean(space, keepdim=True)
    total = x.sum(space, keepdim=True, dtype=x.dtype)
    # With the operator /, autograd would keep n as a tensor.
    mean: Tensor = torch.ops.aten.div.Scalar(total, n)
    return mean


def _mean(x: Tensor, space: list[int]) -> Tensor:
    # fx treats a function as a leaf only where it is called by its global name.
    return _sum_over_n(x, space)


def _plain_mean(x: Tensor, space: list[int]) -> Tensor:
    return x.mean(space, keepdim=True)


def _max(x: Tensor, space: list[int]) -> Tensor:
    return x.amax(space, keepdim=True)


def _all_positions(x: Tensor, space: list[int]) -> Tensor:
    return x


SQUEEZES: dict[Squeeze, SqueezeFunction] = {
    "avg": SqueezeFunction(_mean, _plain_mean, pools=True),
    "max": SqueezeFunction(_max, _max, pools=True),
    "none": SqueezeFunction(_all_positions, _all_positions, pools=False),
}
