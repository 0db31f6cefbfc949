"""WebDataset shards: tar files of images and their labels."""

import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from se_inject.errors import DataError
from se_inject.finetune.data.folders import PARTS
from se_inject.finetune.data.images import extensions, to_rgb
from se_inject.finetune.options.settings import Settings


class Shards:
    """The images of tar files, in which ``KEY.jpg`` (or png, ...) has its label in ``KEY.cls``.

    The tar files are indexed once and then read in any order, so that shuffling and resuming work
    as for all other data. The ``webdataset`` package could only stream them.
    """

    def __init__(self, files: Sequence[Path], root: Path) -> None:
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
                if f".{extension.lower()}" in extensions() and key in labels:
                    self.items.append((path, member.offset_data, member.size))
                    self.names.append(f"{path.relative_to(root).as_posix()}:{member.name}")
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


def open_shards(settings: Settings, name: str) -> Mapping[str, Shards]:
    """Open the parts. ``info.json`` or the names of the shards say which shard is in which part.

    If no shard is named for training, all shards without a part are for training.

    Raises:
        DataError: there are no shards.
    """
    root = Path(settings.data_dir or name).expanduser()
    files = sorted(root.glob("*.tar"))
    if not files:
        raise DataError(
            f"--data {settings.data}: {root} has no *.tar. Give wds/FOLDER, or the folder as"
            " --data-dir."
        )
    info = next((root / name for name in ("_info.json", "info.json") if (root / name).exists()), "")
    splits = json.loads(Path(info).read_text()).get("splits", {}) if info else {}
    found: dict[str, list[Path]] = {}
    for part, words in PARTS.items():
        for split, content in splits.items():
            if split.lower() in words:
                found[part] = [root / file for file in content["filenames"]]
        named = [file for file in files if not set(words).isdisjoint(_words(file.stem))]
        if part not in found and named:
            found[part] = named
    if "train" not in found:
        taken = [file for named in found.values() for file in named]
        found["train"] = [file for file in files if file not in taken]
    return {part: Shards(found[part], root) for part in PARTS if part in found}


def _words(stem: str) -> list[str]:
    """The words in the name of a shard: ``flowers-train-0001`` has flowers and train."""
    return [word.lower() for word in re.split(r"[^A-Za-z]+", stem)]


def _key(name: str) -> tuple[str, str]:
    """The key and the extension, which WebDataset divides at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension
