"""The images on which the gates of a trained network are observed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import timm
from torch import Tensor, nn

from se_inject.errors import DataError
from se_inject.finetune.after.trained import Trained
from se_inject.finetune.data.loading import NO_IMAGE, Images, data_of, loader
from se_inject.finetune.data.parts import Split
from se_inject.finetune.data.split import open_split
from se_inject.finetune.options.settings import Settings


@dataclass(frozen=True)
class Batches:
    """Batches of (images, labels), which can be iterated repeatedly, without unreadable images."""

    images: Images
    settings: Settings
    classes: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y, _ in loader(self.images, self.settings, training=False, epoch=0, rank=0, world=1):
            if y[0] != NO_IMAGE:
                yield x, y


def split_of_run(run: Trained, folder: Path, data: str | None = None) -> Split:
    """The images of a run, or those of other data.

    If the other data have no validation part, all of their images take its place.

    Raises:
        DataError: the other data have other classes.
    """
    if data is None:
        return open_split(run.settings, folder)
    split = open_split(replace(run.settings, data=data), whole=True)
    if split.classes != run.classes:
        raise DataError(f"the classes of {data} are not those of the run, or not in that order.")
    return split


def batches_of_run(run: Trained, split: Split) -> Batches:
    """The validation images of a split, prepared for the network of a run."""
    opened = data_of(split, run.settings, run.data_config, run.settings.seed)
    return Batches(opened.val, run.settings, run.classes)


def batches_of_model(network: nn.Module, settings: Settings) -> Batches:
    """The validation part of ``settings.data``, or else all images, prepared for the network."""
    config = timm.data.resolve_model_data_config(network)
    opened = data_of(open_split(settings, whole=True), settings, config, settings.seed)
    return Batches(opened.val, settings, opened.classes)
