"""How good a network is on a set of images, also by figures that one large class cannot raise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
)

from se_inject.errors import DataError
from se_inject.finetune.data.loading import NO_IMAGE, Images, loader
from se_inject.finetune.options.settings import Settings

TOP5_FROM = 6  # with five classes or fewer, one of the five likeliest is always right


@dataclass(frozen=True)
class Figures:
    """The figures of a confusion matrix, as shares between 0 and 1."""

    top1: float
    balanced: float  # the mean recall of the classes that have images
    macro_f1: float  # the mean F1 of the same classes
    majority: float  # the share of the largest class, which a network reaches by always naming it


def figures_of(matrix: Tensor) -> Figures:
    """The figures of a confusion matrix [classes, classes] whose rows are the true classes."""
    _, recall, f1 = by_class(matrix)
    there = matrix.sum(1) > 0
    return Figures(
        top1=(matrix.diag().sum() / matrix.sum()).item(),
        balanced=recall[there].mean().item(),
        macro_f1=f1[there].mean().item(),
        majority=(matrix.sum(1).max() / matrix.sum()).item(),
    )


def by_class(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The precision, the recall and the F1 of each class.

    The precision is 0 if the class was never predicted, and the recall is 0 if it has no images.
    """
    hits = matrix.diag().double()
    predicted, true = matrix.sum(0).clamp(min=1), matrix.sum(1).clamp(min=1)
    f1 = 2 * hits / (matrix.sum(0) + matrix.sum(1)).clamp(min=1)
    return hits / predicted, hits / true, f1


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` found on one set of images."""

    images: int
    unreadable: list[str]
    matrix: Tensor
    top5: float | None
    auroc: list[float | None]  # of each class against the rest; None where it is not defined

    @property
    def figures(self) -> Figures:
        return figures_of(self.matrix)

    def to_dict(self) -> dict[str, Any]:
        figures = self.figures
        return {
            "images": self.images,
            "top1": figures.top1,
            "top5": self.top5,
            "balanced_accuracy": figures.balanced,
            "macro_f1": figures.macro_f1,
            "majority_share": figures.majority,
        }


@torch.no_grad()
def measure(
    scores_of: Callable[[Tensor], Tensor], images: Images, settings: Settings, classes: int
) -> Measured:
    """Measure a function that takes images [N, C, H, W] and gives scores [N, classes] on the CPU.

    Raises:
        DataError: no image can be read.
    """
    top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
    confusion, auroc = MulticlassConfusionMatrix(classes), MulticlassAUROC(classes, average=None)
    count, unreadable = 0, []
    for x, y, bad in loader(images, settings, training=False, epoch=0, rank=0, world=1):
        unreadable += bad
        if y[0] != NO_IMAGE:
            scores = scores_of(x)
            for metric in (top5, confusion, auroc):
                metric.update(scores, y)
            count += len(y)
    if not count:
        raise DataError(
            f"--data {settings.data}: no image can be read. The first is {unreadable[0]}."
        )
    matrix: Tensor = confusion.compute()
    of_class = matrix.sum(1)
    defined = ((of_class > 0) & (of_class < count)).tolist()
    areas: list[float | None] = [None] * classes
    if any(defined):
        values = auroc.compute().tolist()
        areas = [v if ok else None for v, ok in zip(values, defined, strict=True)]
    return Measured(
        count, unreadable, matrix, top5.compute().item() if classes >= TOP5_FROM else None, areas
    )
