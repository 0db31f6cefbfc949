"""The paper's gates (Table 12): a new gate is a new row, and its name in the ``Literal``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gate = Literal["sigmoid", "tanh", "relu", "hard_sigmoid"]


Init = Literal["identity", "paper"]


@dataclass(frozen=True)
class GateFunctions:
    """A gate as the paper writes it, and the form of it that is exactly 1 at 0.

    The second form is the function ``identity``, or else ``factor`` times the first form. A factor
    is a power of two, so that multiplying by it loses no bit.
    """

    paper: Callable[[Tensor], Tensor]
    formulas: dict[Init, str]
    maximum: dict[Init, float | None]  # that the gate can reach; None: there is no end
    identity: Callable[[Tensor], Tensor] | None = None
    factor: float | None = None

    def of(self, init: Init) -> Callable[[Tensor], Tensor]:
        """The function for a start, without its factor."""
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
    return F.hardsigmoid(z)


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
