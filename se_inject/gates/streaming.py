"""Statistics of gates that never hold more than one batch of them.

The mean and the variance are updated batch by batch with Welford's method (Chan et al., 1983). Of
each class only the mean is kept, in float32. These [classes, C] numbers for each block are all that
grows with the number of classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_inject.errors import ArgumentError


@dataclass(frozen=True)
class Labels:
    """Which images of a batch are of which class."""

    classes: Tensor  # [U], the classes that occur in the batch
    index: Tensor  # [N], for each image, where its class stands in ``classes``
    counts: Tensor  # [U], how many images each of these classes has

    @classmethod
    def of(cls, labels: Tensor, count: int) -> "Labels":
        """Make it from labels [N] between 0 and ``count`` - 1.

        Raises:
            ArgumentError: the labels are something else.
        """
        whole = labels.dim() == 1 and not (labels.is_floating_point() or labels.is_complex())
        if not whole or labels.min() < 0 or labels.max() >= count:
            raise ArgumentError(
                f"the loader's labels must be whole numbers [N] from 0 to {count - 1}, one for each"
                f" of the {count} classes; there is a batch of {list(labels.shape)},"
                f" {labels.flatten()[:4].tolist()}, ..."
            )
        return cls(*torch.unique(labels.long(), return_inverse=True, return_counts=True))

    def to(self, device: torch.device) -> "Labels":
        """The same labels on a device."""
        return Labels(*(t.to(device) for t in (self.classes, self.index, self.counts)))


class GateMoments:
    """Mean, variance and extremes of one SE block's gates [N, C], over the batches seen so far."""

    def __init__(self, gates: Tensor, classes: int | None) -> None:
        channels, device = gates.shape[1], gates.device
        self.images = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)  # summed squares of distances from the mean
        self.low = torch.full_like(self.mean, torch.inf)
        self.high = torch.full_like(self.mean, -torch.inf)
        self.class_images: Tensor | None = None
        self.class_means: Tensor | None = None
        if classes is not None:
            self.class_images = torch.zeros(classes, dtype=torch.int64, device=device)
            self.class_means = torch.zeros(classes, channels, device=device)
            self._class_squares = torch.zeros_like(self.mean)  # the same from the class's mean

    def add(self, gates: Tensor, low: Tensor, high: Tensor, labels: Labels | None) -> None:
        """Take in a batch: gates [N, C], and their extremes [N, C] over the positions."""
        # In float64 the sum of equal numbers is exact, so a constant gate stays exactly constant.
        gates = gates.double()
        count = len(gates)
        mean = gates.sum(0) / count
        step = mean - self.mean
        total = self.images + count
        self._squares += (gates - mean).square().sum(0)
        self._squares += step.square() * (self.images * count / total)
        self.mean += step * (count / total)
        self.images = total
        self.low = torch.minimum(self.low, low.amin(0).double())
        self.high = torch.maximum(self.high, high.amax(0).double())
        if labels is not None:
            self._add_classes(gates, labels)

    def _add_classes(self, gates: Tensor, labels: Labels) -> None:
        assert self.class_means is not None
        assert self.class_images is not None
        before, count = self.class_images[labels.classes][:, None], labels.counts[:, None]
        sums = gates.new_zeros(len(labels.classes), gates.shape[1])
        means = sums.index_add_(0, labels.index, gates) / count
        old = self.class_means[labels.classes].double()
        step = means - old
        self._class_squares += (gates - means[labels.index]).square().sum(0)
        self._class_squares += (step.square() * (before * count / (before + count))).sum(0)
        new = old + step * (count / (before + count))
        self.class_means[labels.classes] = new.float()
        self.class_images[labels.classes] += labels.counts

    @property
    def variance(self) -> Tensor:
        """The variance over the images, [C]. It is 0 for a single image."""
        return self._squares / max(1, self.images - 1)

    @property
    def variance_within(self) -> Tensor | None:
        """The variance over the images of one class, pooled over the classes, [C].

        It is None without classes, and if each class has only one image.
        """
        if self.class_images is None:
            return None
        freedom = self.images - int((self.class_images > 0).sum())
        return self._class_squares / freedom if freedom > 0 else None


def extremes(gate: Tensor, space: Sequence[int], pooled: bool) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each gate over its positions, [N, C] each."""
    if pooled:
        flat = gate.flatten(1)
        return flat, flat
    return gate.amin(tuple(space)), gate.amax(tuple(space))
