"""The paper's gates (Table 12). A new gate needs a row here and its name in the ``Literal``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gate = Literal["sigmoid", "tanh", "relu", "hard_sigmoid"]


Init = Literal["identity", "paper"]


@dataclass(frozen=True)
class GateFunctions:
    """A gate as the paper writes it, and a second form of it that is exactly 1 at 0.

    The second form is the function ``identity``, or else ``factor`` times the first form. A factor
    is a power of two, so that multiplying by it loses no bit.
    """

    paper: Callable[[Tensor], Tensor]
    formulas: dict[Init, str]
    maximum: dict[Init, float | None]  # the largest value of the gate; None means unbounded
    identity: Callable[[Tensor], Tensor] | None = None
    factor: float | None = None

    def of(self, init: Init) -> Callable[[Tensor], Tensor]:
        """The function for this ``init``, without its factor."""
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
    # The form 1 + relu(z) would have no gradient at 0, where the training starts.
    return torch.relu(z + 1)


def _hard_sigmoid(z: Tensor) -> Tensor:
    # On CUDA, hardsigmoid computes float64 with constants of float32: 0 becomes 0.5 + 7e-9.
    return F.relu6(z + 3) / 6 if z.dtype == torch.float64 else F.hardsigmoid(z)


GATES: dict[Gate, GateFunctions] = {
    "sigmoid": GateFunctions(
        _sigmoid,
        {"paper": "sigmoid", "identity": "2 * sigmoid"},
        {"paper": 1.0, "identity": 2.0},
        factor=2.0,
    ),
    "tanh": GateFunctions(
        _tanh,
        {"paper": "tanh", "identity": "1 + tanh"},
        {"paper": 1.0, "identity": 2.0},
        identity=_tanh_plus_one,
    ),
    "relu": GateFunctions(
        _relu,
        {"paper": "relu", "identity": "relu(1 + z)"},
        {"paper": None, "identity": None},
        identity=_relu_of_one_plus,
    ),
    "hard_sigmoid": GateFunctions(
        _hard_sigmoid,
        {"paper": "hard_sigmoid", "identity": "2 * hard_sigmoid"},
        {"paper": 1.0, "identity": 2.0},
        factor=2.0,
    ),
}


class GateLayer(nn.Module):
    """The gate of an SE block as a module, so that hooks can watch it. It has no parameters.

    A call returns the numbers by which the branch is multiplied. They include the factor of the
    gate: a sigmoid that starts as the identity returns ``2 * sigmoid(z)``.

    Args:
        name: a row of :data:`GATES`.
        init: the form of the gate (see :class:`GateFunctions`).
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["scale"]

    function: Callable[[Tensor], Tensor]  # the gate without its factor
    factor: float  # a power of two

    def __init__(self, name: Gate, init: Init = "identity") -> None:
        super().__init__()
        self.name: Gate = name
        self.init: Init = init
        self._choose()

    def _choose(self) -> None:
        """Keep the function as an attribute, because TorchScript cannot read the table."""
        self.function = GATES[self.name].of(self.init)
        self.factor = self.scale or 1.0

    @property
    def scale(self) -> float | None:
        """The factor between this gate and the paper's, or None if it is not a multiple of that."""
        return 1.0 if self.init == "paper" else GATES[self.name].factor

    def to_literal(self) -> None:
        """Switch to the gate as the paper writes it."""
        self.init = "paper"
        self._choose()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's
        return {k: v for k, v in state.items() if k not in ("function", "factor")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self._choose()

    def forward(self, z: Tensor) -> Tensor:
        """The gate of ``z``, the output of the second layer."""
        gate = self.function(z)
        return gate if self.factor == 1.0 else gate * self.factor

    def extra_repr(self) -> str:
        return GATES[self.name].formulas[self.init]
