"""Data sets of Hugging Face: ``hfds/NAME``, read by the ``datasets`` package."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from timm.utils.misc import natural_key

from se_inject.errors import DataError
from se_inject.finetune.data.folders import PARTS
from se_inject.finetune.data.images import to_rgb
from se_inject.finetune.options.settings import Settings
from se_inject.names import few


class Rows:
    """The rows of a data set, each with an image and a label.

    Images are decoded one by one when they are asked for, so that a bad image spoils no other.
    """

    def __init__(self, dataset: Any, image: str, label: str, part: str) -> None:
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        self.image = image
        self.dataset = dataset.cast_column(image, ImageFeature(decode=False))
        values = list(dataset[label])
        feature = dataset.features[label]
        if isinstance(feature, ClassLabel):
            self.classes = tuple(map(str, feature.names))
            self.labels = [int(value) for value in values]
        else:
            words = sorted({str(value) for value in values}, key=lambda w: (natural_key(w), w))
            self.classes = tuple(words)
            index = {word: i for i, word in enumerate(words)}
            self.labels = [index[str(value)] for value in values]
        self.names = [f"{part}/{i}" for i in range(len(values))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content = self.dataset[index][self.image]
        file = content["path"] if content["bytes"] is None else io.BytesIO(content["bytes"])
        with Image.open(file) as image:
            return to_rgb(image), self.labels[index]


def open_hub(settings: Settings, name: str) -> Mapping[str, Rows]:
    """Open the parts of a data set, by the names of its splits and the types of its columns.

    Raises:
        DataError: there is no training split, or it is not clear which columns are meant.
    """
    import datasets

    found = datasets.load_dataset(str(Path(name).expanduser()), cache_dir=settings.data_dir)
    parts = {
        part: found[split]
        for part, words in PARTS.items()
        for split in found
        if split.lower() in words
    }
    if "train" not in parts:
        raise DataError(
            f"--data {settings.data} has the splits {', '.join(found)}, but none is train."
        )
    if others := [split for split in found if not any(split.lower() in w for w in PARTS.values())]:
        warnings.warn(f"--data {settings.data}: the split {few(others)} is left out.", stacklevel=2)
    features = parts["train"].features
    image = _column(settings, "image", settings.image_column, features, (datasets.Image,))
    label = _column(settings, "label", settings.label_column, features, (datasets.ClassLabel,))
    return {part: Rows(dataset, image, label, part) for part, dataset in parts.items()}


def _column(
    settings: Settings, what: str, given: str | None, features: Any, kinds: tuple[type, ...]
) -> str:
    """The column that the user gave, or else the one that fits by its type or its name."""
    fitting: list[str] = [name for name, feature in features.items() if isinstance(feature, kinds)]
    if given is not None:
        if given not in features:
            raise DataError(
                f"--{what}-column {given}: {settings.data} has the columns {', '.join(features)}."
            )
        return given
    if what in fitting:
        return what
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and what in features:
        return what
    raise DataError(
        f"--data {settings.data}: give --{what}-column. Its columns are {', '.join(features)}."
    )
