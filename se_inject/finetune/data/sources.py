"""Where labelled images come from: digits, folders, tables, shards, the data sets of libraries.

Every source has a length, and ``source[i]`` is an RGB image with its label. ``classes`` has the
names of the classes. ``labels`` has the class index of each image, without decoding any image.
``names`` has a name for each image, which is the same whenever the data are opened.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from PIL import Image
from timm.data import create_dataset

from se_inject.errors import DataError, first_line
from se_inject.finetune.data.folders import open_folder
from se_inject.finetune.data.hub import open_hub
from se_inject.finetune.data.images import to_rgb
from se_inject.finetune.data.shards import open_shards
from se_inject.finetune.data.tables import open_table
from se_inject.finetune.options.settings import Settings


class Source(Protocol):
    """Images with labels, by index."""

    classes: tuple[str, ...]
    labels: list[int]

    @property
    def names(self) -> "list[str]": ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


def open_sources(settings: Settings) -> Mapping[str, Source]:
    """Open what ``--data`` names: the part ``train``, and ``val`` and ``test`` if it has them.

    Raises:
        DataError: there are no such data, or they cannot be read.
    """
    data = settings.data
    if not data.strip():
        raise DataError("--data is empty. Give a folder, torch/NAME, hfds/NAME, ... or digits.")
    if data == "digits":
        return {"train": Digits()}
    kind, _, name = data.partition("/")
    if kind in _LIBRARIES and name:
        try:
            return _LIBRARIES[kind](settings, name)
        except DataError:
            raise
        except Exception as error:  # a library that downloads and unpacks may raise anything
            raise DataError(
                f"--data {data} cannot be loaded ({type(error).__name__}: {first_line(error)})."
            ) from error
    root = Path(data).expanduser()
    if root.is_file() and root.suffix.lower() == ".csv":
        return open_table(root)
    if not root.is_dir():
        raise DataError(
            f"--data {data}: there is no such folder, and it is neither FILE.csv, digits,"
            " torch/NAME, hfds/NAME nor wds/FOLDER."
        )
    return open_folder(root)


class InMemory:
    """Grey images [N, H, W] with 8 bits, which are given as RGB images."""

    def __init__(self, pixels: Any, labels: list[int], classes: tuple[str, ...]) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes

    @property
    def names(self) -> list[str]:
        return [str(i) for i in range(len(self.labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.labels[index]


class Digits(InMemory):
    """scikit-learn's 1,797 real handwritten digits of 8x8 pixels."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = (digits.images * (255 / 16)).astype(np.uint8)
        super().__init__(pixels, [int(label) for label in digits.target], tuple("0123456789"))


class Pairs:
    """A torchvision data set of (image, label) pairs."""

    def __init__(self, dataset: Any, part: str) -> None:
        self.dataset = dataset
        labels = getattr(dataset, "targets", None)
        if labels is None:
            labels = getattr(dataset, "labels", getattr(dataset, "_labels", None))
        if labels is None:  # then every pair must be loaded to see its label
            labels = [dataset[i][1] for i in range(len(dataset))]
        self.labels = [int(label) for label in labels]
        self.names = [f"{part}/{i}" for i in range(len(self.labels))]
        names = getattr(dataset, "classes", None) or range(max(self.labels, default=-1) + 1)
        self.classes = tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return to_rgb(image), int(label)


# For these data sets torchvision has training and test images, but no validation images.
_WITH_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")


def _torchvision(settings: Settings, name: str) -> Mapping[str, Source]:
    root = Path(settings.data_dir or ".").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    other = "test" if name.lower() in _WITH_TEST else "val"
    # The processes of a run share the folder. The first one downloads, and the others wait.
    with FileLock(root / ".se_inject.lock"):
        return {
            part: Pairs(
                create_dataset(settings.data, root=str(root), split=split, download=True), part
            )
            for part, split in (("train", "train"), (other, "validation"))
        }


_LIBRARIES: Mapping[str, Callable[[Settings, str], Mapping[str, Source]]] = {
    "torch": _torchvision,
    "hfds": open_hub,
    "wds": open_shards,
}
