"""The paper's variants of an SE block: one table, which the code and its tests read.

A new gate or squeeze is a new row (and its name in the ``Literal``). The functions are plain ones
with the types that TorchScript knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from se_inject.errors import ArgumentError

Placement = Literal["standard", "pre", "post", "identity", "3x3"]
Squeeze = Literal["avg", "max", "none"]
Gate = Literal["sigmoid", "tanh", "relu", "hard_sigmoid"]
Init = Literal["identity", "paper"]


@dataclass(frozen=True)
class GateFunctions:
    """A gate as the paper writes it, and the form of it that is exactly 1 at 0."""

    paper: Callable[[Tensor], Tensor]
    identity: Callable[[Tensor], Tensor]
    formulas: dict[Init, str]
    # The second over the first, a power of two: folding it into a layer loses no bit. None: the
    # second is no multiple of the first.
    factor: float | None = None

    def of(self, init: Init) -> Callable[[Tensor], Tensor]:
        return self.identity if init == "identity" else self.paper


def _sigmoid(z: Tensor) -> Tensor:
    return z.sigmoid()


def _double_sigmoid(z: Tensor) -> Tensor:
    return z.sigmoid() * 2


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


def _double_hard_sigmoid(z: Tensor) -> Tensor:
    return F.hardsigmoid(z) * 2


GATES: dict[Gate, GateFunctions] = {
    "sigmoid": GateFunctions(
        _sigmoid, _double_sigmoid, {"paper": "sigmoid", "identity": "2 * sigmoid"}, 2.0
    ),
    "tanh": GateFunctions(_tanh, _tanh_plus_one, {"paper": "tanh", "identity": "1 + tanh"}),
    "relu": GateFunctions(_relu, _relu_of_one_plus, {"paper": "relu", "identity": "relu(1 + z)"}),
    "hard_sigmoid": GateFunctions(
        _hard_sigmoid,
        _double_hard_sigmoid,
        {"paper": "hard_sigmoid", "identity": "2 * hard_sigmoid"},
        2.0,
    ),
}


@dataclass(frozen=True)
class SqueezeFunction:
    """What the two layers see of a map, and what that costs."""

    of: Callable[[Tensor, list[int]], Tensor]  # the map, and the dims of its space
    pools: bool  # to one position; otherwise the layers run at every position


def _mean(x: Tensor, space: list[int]) -> Tensor:
    """As sum / n: the gradient of a sum is a view, that of a mean fills a map."""
    if x.dtype == torch.float16:  # whose sum could overflow
        return x.mean(space, keepdim=True)
    n = 1
    for dim in space:
        n *= x.shape[dim]
    return x.sum(space, keepdim=True) / n


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
