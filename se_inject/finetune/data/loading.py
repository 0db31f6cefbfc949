"""Batches of labelled images. Their order and augmentation follow from the seed and the epoch."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from se_inject.errors import ArgumentError
from se_inject.finetune.data.parts import Part, Split
from se_inject.finetune.data.split import open_split
from se_inject.finetune.options.settings import Settings

NO_IMAGE = -1  # the label of a place that has no image, or an unreadable one
Sample = tuple[Tensor, int, str]  # an image, its label, and what is wrong with it
Batch = tuple[Tensor, Tensor, list[str]]  # images, labels, and messages about unreadable images


@dataclass(frozen=True)
class Data:
    """The sets of a run, which all have the same classes. ``test`` is None if there is none."""

    classes: tuple[str, ...]
    train: "Images"
    val: "Images"
    test: "Images | None"


class Images(Dataset[Sample]):
    """Transformed images with their labels. A black image stands for an unreadable one.

    The random numbers of a transform follow from the seed, the epoch and the index alone. So a run
    that goes on after a stop sees the same images as it would have seen without the stop.
    """

    def __init__(self, part: Part, transform: Any, seed: int) -> None:
        self.source = part.source
        self.indices = list(part.indices)
        self.labels = list(part.labels)
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | None) -> Sample:
        if index is None:
            return self._none("")
        try:
            image, _ = self.source[self.indices[index]]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return self._none(f"{self.name(index)}: {error}")
        with seeded(self.seed, self.epoch, index):
            return self.transform(image), self.labels[index], ""

    def _none(self, why: str) -> Sample:
        with seeded(self.seed):
            return self.transform(Image.new("RGB", (64, 64))), NO_IMAGE, why

    def name(self, index: int) -> str:
        return self.source.names[self.indices[index]]


def seed_of(*numbers: int) -> int:
    """A seed that follows from all the numbers and is the same in every process."""
    return zlib.crc32(repr(numbers).encode())


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed Python, NumPy and torch from ``numbers``, and restore their states afterwards."""
    with isolate_rng(include_cuda=False):
        seed = seed_of(*numbers)
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed would ask every kind of device too, which takes longer than preparing a
        # small image. The random numbers on the CPU are the same.
        torch.default_generator.manual_seed(seed)
        yield


class Order(DistributedSampler[Any]):
    """torch's order by seed and epoch, divided among the processes. It tells its images the epoch.

    All processes must have the same number of batches, or they would wait for each other. So in
    training torch repeats the first images. In validation each image must count only once, so None
    takes the place of a repeated image. Lightning calls ``set_epoch`` before it starts the workers.
    """

    balanced = False  # whether to draw equally many images of each class, with repetition

    def _drawn(self) -> Iterator[int]:
        assert isinstance(self.dataset, Images)
        labels = torch.tensor(self.dataset.labels)
        weights = 1 / labels.bincount()[labels].double()
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.multinomial(weights, self.total_size, replacement=True, generator=generator)
        return iter(drawn[self.rank :: self.num_replicas].tolist())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        images = self.dataset
        assert isinstance(images, Images)
        images.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if self.balanced:
            return self._drawn()
        if self.shuffle:
            return super().__iter__()
        own: list[int | None] = list(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]  # it has a length
        return iter(own + [None] * (self.num_samples - len(own)))


def loader(
    images: Images, settings: Settings, *, training: bool, epoch: int, rank: int, world: int
) -> DataLoader[Any]:
    """The batches of one process. All processes together have ``settings.batch_size`` images."""
    order = Order(images, world, rank, shuffle=training, seed=images.seed, drop_last=False)
    order.balanced = training and settings.sampler == "balanced"
    order.set_epoch(epoch)
    size = settings.batch_size // world
    return DataLoader(
        images,
        batch_size=size,
        sampler=order,
        # A BatchNorm has no statistics if the last batch has a single image.
        drop_last=training and len(order) > size,
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def balanced_weights(images: Images, classes: int) -> Tensor:
    """A weight for each class. All classes weigh the same, and an image weighs 1 on average."""
    counts = torch.tensor(images.labels).bincount(minlength=classes).clamp(min=1)
    return len(images) / (classes * counts.float())


def collate(samples: list[Sample]) -> Batch:
    """Make a batch of the samples that have an image.

    If none of them has one, the black images stay in the batch with the label NO_IMAGE. So no batch
    is empty: a process that skipped a step would leave the others waiting.
    """
    unreadable = [why for _, _, why in samples if why]
    good = [sample for sample in samples if sample[1] != NO_IMAGE] or samples
    images, labels = default_collate([(image, label) for image, label, _ in good])
    return images, labels, unreadable


# --- the sets of a run ---------------------------------------------------------------------------


def open_data(
    settings: Settings, config: dict[str, Any], seed: int, *, whole: bool = False
) -> Data:
    """The sets of a run that has not begun, as :func:`data_of` makes them."""
    return data_of(open_split(settings, whole=whole), settings, config, seed)


def data_of(split: Split, settings: Settings, config: dict[str, Any], seed: int) -> Data:
    """The images of a run, prepared for its network.

    Args:
        config: how images are prepared for the network, as ``timm.data.resolve_model_data_config``
            says.
        seed: the order and the augmentation follow from it.
    """
    training, validation = transforms(settings, config)
    parts = {
        name: Images(part, training if name == "train" else validation, seed)
        for name, part in split.parts.items()
    }
    return Data(split.classes, parts["train"], parts["val"], parts.get("test"))


def transforms(settings: Settings, config: dict[str, Any]) -> tuple[Any, Any]:
    """timm's transforms for the network: those for training, and those for validation.

    Raises:
        ArgumentError: timm does not know the augmentation of ``--aa``.
    """
    size = settings.img_size
    config = {**config, **({"input_size": (3, size, size)} if size else {})}
    try:
        training = create_transform(
            **config,
            is_training=True,
            auto_augment=settings.aa,
            scale=(settings.scale, 1.0),
            hflip=_hflip(settings),
            vflip=settings.vflip,
            color_jitter=settings.color_jitter,
            re_prob=settings.reprob,
        )
    except Exception as error:  # timm reads --aa with asserts and look-ups
        if settings.aa is None:
            raise
        raise ArgumentError(
            f"--aa {settings.aa} is not an augmentation of timm. Give one such as rand-m9-mstd0.5,"
            " augmix-m3-w3 or original."
        ) from error
    return training, create_transform(**{**config, "crop_pct": 1.0}, is_training=False)


def _hflip(settings: Settings) -> float:
    """The share of mirrored images. By default it is 0 for digits: a mirrored digit is none."""
    if settings.hflip is None:
        return 0.0 if settings.data == "digits" else 0.5
    return settings.hflip
