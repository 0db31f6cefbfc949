"""Where labelled images come from: digits, folders, shards, and the data sets of libraries.

Every source has ``len``, ``classes`` (names), ``labels`` (one index an item, known without
decoding an image) and ``source[i]``, an RGB image with its label.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import create_reader
from timm.utils.misc import natural_key

from se_inject.errors import DataError
from se_inject.finetune.settings import Settings

TRAINING, VALIDATION = ("train", "training"), ("val", "validation", "valid", "test")


class Source(Protocol):
    """Images with labels, by index."""

    classes: tuple[str, ...]
    labels: list[int]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


def open_sources(settings: Settings) -> tuple[Source, Source | None]:
    """What ``--data`` names: a training source and, where the data have one, another to validate.

    Raises:
        DataError: there is no such data, or it cannot be read.
    """
    data = settings.data
    if data == "digits":
        return Digits(), None
    kind, _, name = data.partition("/")
    if kind in _LIBRARIES and name:
        try:
            return _LIBRARIES[kind](settings, name)
        except DataError:
            raise
        except Exception as error:  # of a library that downloads and unpacks
            raise DataError(
                f"--data {data}: cannot be had ({type(error).__name__}:"
                f" {next(iter(str(error).splitlines()), '')})."
            ) from error
    root = Path(data)
    if not root.is_dir():
        raise DataError(
            f"--data {data}: no such folder (nor digits, torch/NAME, hfds/NAME, wds/FOLDER)."
        )
    parts = {part: root / part for part in (*TRAINING, *VALIDATION) if (root / part).is_dir()}
    train = next((parts[part] for part in TRAINING if part in parts), None)
    val = next((parts[part] for part in VALIDATION if part in parts), None)
    if train is not None and val is not None:
        return _folder(train), _folder(val)
    return _folder(root), None


# --- sources -------------------------------------------------------------------------------------


class Digits:
    """scikit-learn's 1,797 real handwritten digits, 8x8 pixels, as RGB images."""

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


class Files:
    """Images of a timm reader, opened here so that a bad file is an error with its name."""

    def __init__(self, reader: Any, labels: list[int], names: Sequence[str] | None) -> None:
        self.reader = reader
        self.labels = labels
        self.names = names
        order = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        self.classes = tuple(map(str, order))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        with file:
            return to_rgb(Image.open(file)), label


class Pairs:
    """A torchvision data set of (image, label) pairs."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        labels = getattr(dataset, "targets", None)
        if labels is None:
            labels = getattr(dataset, "labels", getattr(dataset, "_labels", None))
        if labels is None:  # no other way than to look at all of them
            labels = [dataset[i][1] for i in range(len(dataset))]
        self.labels = [int(label) for label in labels]
        names = getattr(dataset, "classes", None) or range(max(self.labels, default=-1) + 1)
        self.classes = tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return to_rgb(image), int(label)


class Shards:
    """WebDataset shards: tar files in which ``KEY.jpg`` (or png, webp) has its label ``KEY.cls``.

    The tar files are indexed once and then read at random, so that order and resuming are those
    of any other data; the ``webdataset`` package would only stream them.
    """

    EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")

    def __init__(self, files: Sequence[Path]) -> None:
        self.items: list[tuple[Path, int, int]] = []  # file, offset and size of the image
        self.names: list[str] = []
        words: list[str] = []
        for path in files:
            with tarfile.open(path) as tar:
                members = [member for member in tar if member.isfile()]
                labels = {
                    _key(member.name)[0]: (tar.extractfile(member) or io.BytesIO()).read()
                    for member in members
                    if _key(member.name)[1] == "cls"
                }
            for member in members:
                key, extension = _key(member.name)
                if extension.lower() in self.EXTENSIONS and key in labels:
                    self.items.append((path, member.offset_data, member.size))
                    self.names.append(f"{path}:{member.name}")
                    words.append(labels[key].decode().strip())
        numbers = all(word.isdecimal() for word in words)
        count = 1 + max((int(word) for word in words if numbers), default=-1)
        self.classes = tuple(map(str, range(count))) if numbers else tuple(sorted(set(words)))
        indices = {name: i for i, name in enumerate(self.classes)}
        self.labels = [int(word) if numbers else indices[word] for word in words]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, offset, size = self.items[index]
        with path.open("rb") as file:
            file.seek(offset)
            return to_rgb(Image.open(io.BytesIO(file.read(size)))), self.labels[index]


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with eight bits a channel, RGB. PIL alone would clip 16-bit grey to white."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if pixels.max() > 255 else 1.0
        image = Image.fromarray((pixels * scale).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


# --- how each kind is found ----------------------------------------------------------------------


def _folder(root: Path) -> Files:
    try:
        # timm sorts a set by natural_key, for which "a1" and "a01" are the same.
        found = create_reader("folder", str(root)).class_to_idx
        order = sorted(found, key=lambda name: (natural_key(name), name))
        reader = create_reader(
            "folder", str(root), class_map={name: i for i, name in enumerate(order)}
        )
    except RuntimeError as error:
        raise DataError(
            f"{root}: no images in it. Wanted is a folder that has a folder for each class."
        ) from error
    names = reader.filenames(basename=False, absolute=False)
    labels = [int(label) for _, label in reader.samples]
    if "" in found:
        stray = names[labels.index(order.index(""))]
        raise DataError(f"{root}: {stray} lies beside the class folders. Move it into one.")
    return Files(reader, labels, names)


def _torchvision(settings: Settings, _: str) -> tuple[Source, Source | None]:
    root = Path(settings.data_dir or ".")
    root.mkdir(parents=True, exist_ok=True)
    # The processes of a run share the folder: the first one downloads.
    with FileLock(root / ".se_inject.lock"):
        train, val = (
            create_dataset(settings.data, root=str(root), split=split, download=True)
            for split in ("train", "validation")
        )
    return Pairs(train), Pairs(val)


def _hugging_face(settings: Settings, _: str) -> tuple[Source, Source | None]:
    def part(split: str) -> Files:
        reader = create_reader(settings.data, root=settings.data_dir, split=split)
        return Files(reader, list(reader.dataset[reader.label_key]), None)

    train = part("train")
    splits = train.reader.dataset.info.splits or {}
    val = next((split for split in VALIDATION if split in splits), None)
    return train, None if val is None else part(val)


def _shards(settings: Settings, name: str) -> tuple[Source, Source | None]:
    root = Path(settings.data_dir or name)
    files = sorted(root.glob("*.tar"))
    if not files:
        raise DataError(
            f"--data {settings.data}: {root} has no *.tar. Give wds/FOLDER, or the folder as"
            " --data-dir."
        )
    info = next((root / name for name in ("_info.json", "info.json") if (root / name).exists()), "")
    splits = json.loads(Path(info).read_text()).get("splits", {}) if info else {}

    def part(names: Sequence[str]) -> list[Path]:
        for split in names:
            if split in splits:
                return [root / file for file in splits[split]["filenames"]]
        return [file for file in files if any(split in file.stem for split in names)]

    train, val = part(TRAINING), part(VALIDATION)
    return (Shards(train), Shards(val)) if train and val else (Shards(files), None)


def _key(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset has them, divided at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


_LIBRARIES = {"torch": _torchvision, "hfds": _hugging_face, "wds": _shards}
