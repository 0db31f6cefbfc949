"""A folder of images: which of its folders are splits, which are classes, and what is not data.

The classes are the folders directly below the data folder, or directly below each of its split
folders. All that lies deeper in a class folder belongs to that class.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image
from timm.utils.misc import natural_key

from se_inject.errors import DataError
from se_inject.finetune.data.images import is_image, is_junk, to_rgb
from se_inject.names import few

# The names that the folders of the parts may have, in upper or lower case.
TRAIN, VAL, TEST = ("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing")
PARTS: Mapping[str, Sequence[str]] = {"train": TRAIN, "val": VAL, "test": TEST}

_ALIKE = re.compile(
    r"(train|training|val|valid|validation|dev|eval|evaluation|test|testing|holdout|split)"
    r"[-_ .]?(set|sets|data|dataset|images?|imgs?|split|\d*)",
    re.IGNORECASE,
)


class Folder:
    """The images of class folders. The name of an image is its path relative to the data folder."""

    def __init__(self, root: Path, found: Sequence[tuple[str, str]]) -> None:
        """``found`` has the class and the path below ``root`` of each image."""
        # natural_key alone would leave the order of "a1" and "a01" open, which it takes as equal.
        self.classes = tuple(sorted({c for c, _ in found}, key=lambda c: (natural_key(c), c)))
        index = {name: i for i, name in enumerate(self.classes)}
        ordered = sorted(found, key=lambda entry: (natural_key(entry[1]), entry[1]))
        self.root = root
        self.names = [path for _, path in ordered]
        self.labels = [index[name] for name, _ in ordered]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.root / self.names[index]) as image:
            return to_rgb(image), self.labels[index]


def open_folder(root: Path) -> dict[str, Folder]:
    """Open the parts of a folder: train, and also val and test if it has them.

    A warning counts the files and folders that are left out.

    Raises:
        DataError: it is not clear which folders are splits, or images lie beside the classes.
    """
    left: Counter[str] = Counter()
    tops = split_folders(root)
    parts = {part: Folder(root, list(_class_images(root, top, left))) for part, top in tops.items()}
    if left:
        counts = ", ".join(f"{count} x {what}" for what, count in left.most_common(8))
        warnings.warn(
            f"{root}: these files are no images and are left out: {counts}.", stacklevel=2
        )
    return parts


def split_folders(root: Path) -> dict[str, Path]:
    """Find the folder of each part. Without split folders, the whole folder is the part train."""
    folders = [path for path in _entries(root) if path.is_dir()]
    known: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in folders:
        for part, words in PARTS.items():
            # A class may have such a name too, but only a split has class folders in it.
            if path.name.lower() in words and _has_class_folders(path):
                known[part].append(path)
    names = {part: [path.name for path in paths] for part, paths in known.items() if paths}
    taken = [path for paths in known.values() for path in paths]
    others = [path for path in folders if path not in taken]
    if not names:
        alike = [path.name for path in folders if _ALIKE.fullmatch(path.name)]
        if alike and any(_has_class_folders(root / name) for name in alike):
            raise DataError(
                f"{root}: {few(alike)} look like splits, and would be taken for classes. {_WANTED}"
            )
        return {"train": root}
    understood = ", ".join(f"{part} = {'/, '.join(paths)}/" for part, paths in names.items())
    if any(len(paths) > 1 for paths in known.values()) or "train" not in names:
        what = "two folders for one part" if "train" in names else "no folder to train on"
        raise DataError(f"{root}: understood {understood}, and so {what}. {_WANTED}")
    unclear = [p.name for p in others if "val" not in names or _has_class_folders(p)]
    if unclear:
        raise DataError(
            f"{root}: understood {understood}, and not what {few(unclear)} should be. {_WANTED}"
        )
    if others:
        beside = few([path.name for path in others])
        warnings.warn(f"{root}: {beside} lies beside the splits and is left out.", stacklevel=3)
    return {part: paths[0] for part, paths in known.items() if paths}


_WANTED = (
    "Name the folders train, val and test, or give a folder of class folders, or a FILE.csv with"
    " path,label,split."
)


def _class_images(root: Path, top: Path, left: Counter[str]) -> Iterator[tuple[str, str]]:
    """The class and the relative path of each image below the class folders of ``top``."""
    for entry in _entries(top):
        if entry.is_dir():
            count = 0
            for path in _files(entry, {os.path.realpath(top)}):
                if is_image(path):
                    count += 1
                    yield entry.name, path.relative_to(root).as_posix()
                else:
                    left[path.suffix.lower() or "files without extension"] += 1
            if not count:
                left[f"the folder {entry.name}, in which there is no image"] += 1
        elif is_image(entry):
            stray = entry.relative_to(root)
            raise DataError(f"{root}: {stray} lies beside the class folders. Move it into one.")
        else:
            left[entry.suffix.lower() or "files without extension"] += 1


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in the folders below it, except junk."""
    return _files(folder, set())


def _files(folder: Path, above: set[str]) -> Iterator[Path]:
    """All files below a folder. A link that leads back to a folder above it is not followed."""
    real = os.path.realpath(folder)
    if any(up == real or up.startswith(real.rstrip(os.sep) + os.sep) for up in above):
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(entry, above | {real})
        else:
            yield entry


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not is_junk(path.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}).") from error


def _has_class_folders(folder: Path) -> bool:
    return any(path.is_dir() for path in _entries(folder))
