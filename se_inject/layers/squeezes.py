"""The paper's squeezes (Tables 11, 16): a new one is a new row, and its name in the ``Literal``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

Squeeze = Literal["avg", "max", "none"]


@dataclass(frozen=True)
class SqueezeFunction:
    """What the two layers see of a map, and what that costs."""

    of: Callable[[Tensor, list[int]], Tensor]  # the map, and the dims of its space
    pools: bool  # to one position; otherwise the layers run at every position


@fx.wrap
def _sum_over_n(x: Tensor, space: list[int]) -> Tensor:
    """The mean as sum / n: the gradient of a sum is a view, that of a mean fills a map.

    The dtype is named because CUDA's autocast makes a sum float32 otherwise, and the gradient,
    cast back, would fill a map after all. A leaf of ``fx.symbolic_trace``, which knows no dtype.
    """
    if x.dtype == torch.float16:  # whose sum could overflow
        return x.mean(space, keepdim=True)
    n = 1
    for dim in space:
        n *= x.shape[dim]
    total = x.sum(space, keepdim=True, dtype=x.dtype)
    # jit.trace has n as a tensor, jit.script knows no overload by name.
    if torch.jit.is_scripting() or torch.jit.is_tracing():  # type: ignore
        return total / n
    # Not /, for which autograd keeps n as a tensor.
    mean: Tensor = torch.ops.aten.div.Scalar(total, n)
    return mean


def _mean(x: Tensor, space: list[int]) -> Tensor:
    return _sum_over_n(x, space)  # by its name: fx takes no other reference for a leaf


def _max(x: Tensor, space: list[int]) -> Tensor:
    return x.amax(space, keepdim=True)


def _all_positions(x: Tensor, space: list[int]) -> Tensor:
    return x


SQUEEZES: dict[Squeeze, SqueezeFunction] = {
    "avg": SqueezeFunction(_mean, pools=True),
    "max": SqueezeFunction(_max, pools=True),
    "none": SqueezeFunction(_all_positions, pools=False),
}
