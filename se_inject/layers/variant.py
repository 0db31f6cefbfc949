"""The paper's variants of an SE block: one table, which the code and its tests read.

A new gate or squeeze is a new row (and its name in the ``Literal``). The functions are plain ones
with the types that TorchScript knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from se_inject.errors import ArgumentError

Placement = Literal["standard", "pre", "post", "identity", "3x3"]
Squeeze = Literal["avg", "max", "none"]
Gate = Literal["sigmoid", "tanh", "relu", "hard_sigmoid"]
Init = Literal["identity", "paper"]


@dataclass(frozen=True)
class GateFunctions:
    """A gate as the paper writes it, and the form of it that is exactly 1 at 0.

    The second is ``identity``, or ``factor`` times the first: a power of two, which loses no bit
    wherever it is multiplied.
    """

    paper: Callable[[Tensor], Tensor]
    formulas: dict[Init, str]
    identity: Callable[[Tensor], Tensor] | None = None
    factor: float | None = None

    def of(self, init: Init) -> Callable[[Tensor], Tensor]:
        """The function, but for its factor."""
        return self.identity if init == "identity" and self.identity else self.paper


def _sigmoid(z: Tensor) -> Tensor:
    return z.sigmoid()


def _tanh(z: Tensor) -> Tensor:
    return z.tanh()


def _tanh_plus_one(z: Tensor) -> Tensor:
    return z.tanh() + 1


def _relu(z: Tensor) -> Tensor:
    return torch.relu(z)


def _relu_of_one_plus(z: Tensor) -> Tensor:
    # Not 1 + relu(z): that has no gradient at 0, where the training starts.
    return torch.relu(z + 1)


def _hard_sigmoid(z: Tensor) -> Tensor:
    return F.hardsigmoid(z)


GATES: dict[Gate, GateFunctions] = {
    "sigmoid": GateFunctions(_sigmoid, {"paper": "sigmoid", "identity": "2 * sigmoid"}, factor=2.0),
    "tanh": GateFunctions(
        _tanh, {"paper": "tanh", "identity": "1 + tanh"}, identity=_tanh_plus_one
    ),
    "relu": GateFunctions(
        _relu, {"paper": "relu", "identity": "relu(1 + z)"}, identity=_relu_of_one_plus
    ),
    "hard_sigmoid": GateFunctions(
        _hard_sigmoid, {"paper": "hard_sigmoid", "identity": "2 * hard_sigmoid"}, factor=2.0
    ),
}


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


@dataclass(frozen=True)
class Variant:
    """Which SE block goes where: what a plan, an injected block and its checkpoint all say.

    Paper: the journal version of arXiv 1709.01507, section 6 (ablations).
    """

    placement: Placement = "standard"  # Table 14, Table 15
    squeeze: Squeeze = "avg"  # Table 11, Table 16
    gate: Gate = "sigmoid"  # Table 12
    bias: bool = True  # of the two layers; the paper's ablations have none
    init: Init = "identity"
    divisor: int = 8

    def check(self) -> None:
        """Raise an :class:`ArgumentError` for a value that is not known."""
        for name, kind in _NAMED.items():
            value: Any = getattr(self, name)
            if value not in get_args(kind):
                *first, last = map(repr, get_args(kind))
                raise ArgumentError(
                    f"{name}={value!r} is not known; use {', '.join(first)} or {last}."
                )
        if not isinstance(self.bias, bool):
            raise ArgumentError(f"bias={self.bias!r} is neither True nor False.")

    def differing(self) -> dict[str, Any]:
        """The options that make other blocks than the standard one, or put them elsewhere."""
        standard = Variant()
        names = ("placement", "squeeze", "gate", "bias")
        return {
            name: value
            for name in names
            if (value := getattr(self, name)) != getattr(standard, name)
        }


_NAMED = {"placement": Placement, "squeeze": Squeeze, "gate": Gate, "init": Init}
