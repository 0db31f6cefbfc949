"""Images with labels, the same in every run: order and augmentation follow seed and epoch."""

import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from se_inject.errors import ArgumentError, DataError
from se_inject.finetune.settings import Settings

Batch = tuple[Tensor, Tensor, list[str]]  # images, labels, and the names of what was unreadable


@dataclass(frozen=True)
class Data:
    """A training and a validation set with the same classes."""

    classes: tuple[str, ...]
    train: "Images"
    val: "Images"


class Images(Dataset[tuple[Tensor, int] | str]):
    """Transformed images and labels; in place of an unreadable image, what is wrong with it.

    Random transforms draw from numbers that belong to seed, epoch and index alone, so a run that
    was stopped sees, when it goes on, what it would have seen.
    """

    def __init__(self, source: Any, indices: Sequence[int], transform: Any, seed: int) -> None:
        self.source = source
        self.indices = list(indices)
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = self.source[self.indices[index]]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{self.name(index)}: {error}"
        with seeded(self.seed, self.epoch, index):
            return self.transform(image), int(label)

    def name(self, index: int) -> str:
        names = getattr(self.source, "names", None)
        return str(names[self.indices[index]]) if names else f"image {self.indices[index]}"


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch that follow from ``numbers``; then as before."""
    seed = zlib.crc32(repr(numbers).encode())
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Order(DistributedSampler[Any]):
    """torch's order by seed and epoch, split over the processes; tells its images the epoch.

    Lightning calls ``set_epoch`` before it starts the workers of an epoch.
    """

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        images = self.dataset
        assert isinstance(images, Images)
        images.epoch = epoch


def loader(
    images: Images, settings: Settings, *, training: bool, epoch: int, rank: int, world: int
) -> DataLoader[Any]:
    """Batches of one process; all processes together see batches of ``settings.batch_size``."""
    order = Order(images, world, rank, shuffle=training, seed=images.seed, drop_last=False)
    order.set_epoch(epoch)
    size = max(1, settings.batch_size // world)
    return DataLoader(
        images,
        batch_size=size,
        sampler=order,
        # A last batch of one image has no statistics for a BatchNorm.
        drop_last=training and len(order) > size,
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def collate(samples: list[tuple[Tensor, int] | str]) -> Batch:
    """A batch without the images that could not be read."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    bad = [sample for sample in samples if isinstance(sample, str)]
    if not good:
        return torch.empty(0), torch.empty(0, dtype=torch.long), bad
    images, labels = default_collate(good)
    return images, labels, bad


# --- where images come from ----------------------------------------------------------------------


class _Digits:
    """scikit-learn's 1,797 real handwritten digits, 8x8 pixels, enlarged to RGB images."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = (digits.images * (255 / 16)).astype(np.uint8)
        self.labels = [int(label) for label in digits.target]
        self.classes = tuple(map(str, range(10)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.labels[index]


class _Files:
    """Images of a timm reader, opened here so that a bad file is an error with its name."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.names = reader.filenames(basename=False, absolute=False)
        self.labels = [int(label) for _, label in reader.samples]
        order = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        self.classes = tuple(map(str, order))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        with file:
            return to_rgb(Image.open(file)), label


class _Labelled:
    """A dataset of (image, label) pairs: torchvision's, Hugging Face's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        labels = getattr(dataset, "targets", None)
        if labels is None:
            labels = getattr(dataset, "labels", None)
        if labels is None:  # no other way than to look at all of them
            labels = [dataset[i][1] for i in range(len(dataset))]
        self.labels = [int(label) for label in labels]
        names = getattr(dataset, "classes", None) or range(max(self.labels) + 1)
        self.classes = tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return to_rgb(image), int(label)


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, RGB: PIL alone would clip 16-bit grey to white."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if pixels.max() > 255 else 1.0
        image = Image.fromarray((pixels * scale).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def open_data(
    settings: Settings, config: dict[str, Any], seed: int, *, whole: bool = False
) -> Data:
    """The sets of a run.

    Args:
        config: what ``timm.data.resolve_model_data_config`` says of the network.
        seed: of the order and the augmentation.
        whole: validate on all images where there is no validation part, instead of a share.

    Raises:
        DataError: there are no images, one class only, or training and validation do not fit.
    """
    train, val = _sources(settings)
    if len(train) == 0:
        raise DataError(f"--data {settings.data}: there are no images.")
    if len(train.classes) < 2:
        raise DataError(
            f"--data {settings.data}: one class only ({train.classes[0]}); give a folder that has a"
            " folder for each class."
        )
    if val is None:
        ours, theirs = split(train.labels, settings.val_split)
        if whole:
            theirs = list(range(len(train)))
        val = train
    else:
        ours, theirs = list(range(len(train))), list(range(len(val)))
        if unknown := set(val.classes) - set(train.classes):
            raise DataError(
                f"the validation set has classes that are not in the training set:"
                f" {', '.join(sorted(unknown)[:3])}."
            )
        if missing := set(train.classes) - set(val.classes):
            raise DataError(
                f"the validation set lacks classes of the training set:"
                f" {', '.join(sorted(missing)[:3])}. Add images, or leave out val/ and use"
                " --val-split."
            )
    if not theirs:
        raise DataError(
            f"--data {settings.data}: no image is left to validate on. Raise --val-split or add"
            " images."
        )
    training, validation = transforms(settings, config)
    return Data(
        train.classes,
        Images(train, ours, training, seed),
        Images(val, theirs, validation, seed),
    )


def transforms(settings: Settings, config: dict[str, Any]) -> tuple[Any, Any]:
    """timm's own for the network; digits are not mirrored."""
    size = settings.img_size
    config = {**config, **({"input_size": (3, size, size)} if size else {})}
    training = create_transform(
        **config,
        is_training=True,
        auto_augment=settings.aa,
        scale=(0.7, 1.0),
        hflip=0.0 if settings.data == "digits" else 0.5,
        color_jitter=None,
    )
    return training, create_transform(**{**config, "crop_pct": 1.0}, is_training=False)


def split(labels: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Indices for training and validation, the same share of each class, always the same ones."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    counts = Counter(labels)
    wanted = {
        label: min(count - 1, max(1, round(count * share))) for label, count in counts.items()
    }
    taken: Counter[int] = Counter()
    train, val = [], []
    for index in order:
        label = labels[index]
        if taken[label] < wanted[label]:
            taken[label] += 1
            val.append(index)
        else:
            train.append(index)
    return sorted(train), sorted(val)


def _sources(settings: Settings) -> tuple[Any, Any]:
    if settings.data == "digits":
        return _Digits(), None
    if "/" in settings.data and settings.data.partition("/")[0] in ("torch", "hfds"):
        return _named(settings, "train"), _named(settings, "validation")
    if settings.data.startswith(("wds/", "tfds/")):
        raise ArgumentError(
            f"--data {settings.data}: streams of shards have no index to resume from; unpack them"
            " to a folder of class folders."
        )
    root = Path(settings.data)
    if not root.is_dir():
        raise DataError(
            f"--data {settings.data}: no such folder (nor digits, torch/NAME or hfds/NAME)."
        )
    val = next(
        (root / name for name in ("val", "validation", "test") if (root / name).is_dir()), None
    )
    if (root / "train").is_dir() and val is not None:
        return _folder(root / "train"), _folder(val)
    return _folder(root), None


def _folder(root: Path) -> _Files:
    from timm.data.readers import create_reader

    try:
        return _Files(create_reader("folder", str(root)))
    except RuntimeError as error:
        raise DataError(
            f"{root}: no images in it. Wanted is a folder that has a folder for each class."
        ) from error


def _named(settings: Settings, part: str) -> _Labelled:
    try:
        dataset = create_dataset(
            settings.data, root=settings.data_dir or ".", split=part, download=True
        )
        return _Labelled(dataset)
    except Exception as error:  # of a library that downloads and unpacks
        raise DataError(
            f"--data {settings.data}: its {part} part cannot be had ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else ''})."
        ) from error
