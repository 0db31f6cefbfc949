"""How much the outputs of two networks differ on the same images."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from se_inject.errors import ArgumentError, DataError
from se_inject.gates.statistics import batches, device_of, evaluating


@dataclass(frozen=True)
class Change:
    """How much the outputs of two networks differ over all images.

    ``relative`` is the largest difference as a share of the first network's largest output.
    ``answers`` is the share of images whose likeliest class differs. It is None if the outputs are
    not scores [N, K].
    """

    images: int
    largest: float  # the largest difference between two corresponding numbers
    relative: float
    answers: float | None

    def __str__(self) -> str:
        answers = "" if self.answers is None else f", other answers for {100 * self.answers:.2g} %"
        return (
            f"largest change of the output {self.largest:.2g}, {100 * self.relative:.2g} % of the"
            f" largest output{answers} ({self.images} images)"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return dict(vars(self))


def measure_change(before: nn.Module, after: nn.Module, loader: Iterable[Any]) -> Change:
    """Run two networks on all images, in eval mode, and compare their outputs.

    Args:
        before, after: the two networks, on the same device.
        loader: gives batches as :func:`gate_statistics` takes them.

    Raises:
        DataError: there is no image, or an output is not a finite number.
        ArgumentError: a network returns no tensor of floating-point numbers, or a batch is not as
            described.
    """
    largest, scale, images = 0.0, 0.0, 0
    other: int | None = 0
    device = device_of(before)
    with evaluating(before), evaluating(after):
        for x, _ in batches(loader):
            x = x.to(device)
            a, b = _outputs(before(x.clone())), _outputs(after(x))
            images += len(x)
            for one, two in zip(a, b, strict=True):
                largest = max(largest, _greatest(one.double() - two.double()))
                scale = max(scale, _greatest(one))
            if other is not None and a[0].dim() == 2 and a[0].shape[1] > 1:
                other += int((a[0].argmax(1) != b[0].argmax(1)).sum())
            else:
                other = None
    if not images:
        raise DataError("the loader gives no image to compare the outputs of.")
    if not math.isfinite(largest):
        raise DataError("outputs of the network are not finite, so they cannot be compared.")
    relative = largest / scale if largest else 0.0
    return Change(images, largest, relative, None if other is None else other / images)


def _outputs(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    found = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not found:
        raise ArgumentError("the model returns no tensor of numbers that could be compared.")
    return found


def _greatest(tensor: Tensor) -> float:
    value = float(torch.linalg.vector_norm(tensor, torch.inf))
    return math.inf if math.isnan(value) else value
