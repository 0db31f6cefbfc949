"""Predicts the classes of images with the chosen network of a run, even if some are unreadable."""

import csv
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from se_inject.errors import DataError
from se_inject.finetune.after.trained import Trained
from se_inject.finetune.data.folders import files_below
from se_inject.finetune.data.images import is_image, to_rgb
from se_inject.finetune.data.loading import transforms
from se_inject.keep.atomic import atomic_write


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image with their probabilities, or what is wrong with it."""

    path: Path
    likely: tuple[tuple[str, float], ...]
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        if self.error:
            return {"path": str(self.path), "error": self.error}
        classes = [{"class": name, "probability": p} for name, p in self.likely]
        return {"path": str(self.path), "predictions": classes}


def images_of(words: Sequence[str]) -> list[Path]:
    """The images that files, folders and globs name, each once and in order.

    Raises:
        DataError: a folder has no image, or a glob matches nothing.
    """
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            own = [file for file in files_below(path) if is_image(file)]
            if not own:
                raise DataError(f"{path}: there is no image in this folder.")
        elif not path.exists() and glob.has_magic(word):
            own = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            own = [file for file in own if file.is_file()]
            if not own:
                raise DataError(f"{word} matches no file.")
        else:
            own = [path]
        found.update(dict.fromkeys(own))
    return list(found)


def predict_all(
    run: Trained, paths: Sequence[Path], *, count: int = 3, batch_size: int = 64
) -> Iterator[Prediction]:
    """Predict the classes of each image, in order. For an unreadable image, say what is wrong."""
    _, transform = transforms(run.settings, run.data_config)
    batches = DataLoader(_Files(paths, transform), batch_size=batch_size, collate_fn=_together)
    for images, reasons in batches:
        good = iter(())
        if images is not None:
            with torch.no_grad():
                good = iter(run.scores(images).softmax(1))
        for index, reason in reasons:
            if reason:
                yield Prediction(paths[index], (), reason)
            else:
                yield Prediction(paths[index], _likeliest(next(good), run.classes, count))


def predict(run: Trained, path: Path, count: int = 3) -> list[tuple[str, float]]:
    """The likeliest classes of one image, with their probabilities.

    Raises:
        DataError: the image cannot be read.
    """
    [found] = predict_all(run, [path], count=count)
    if found.error:
        raise DataError(found.error)
    return list(found.likely)


def write_predictions(path: Path, predictions: Sequence[Prediction], count: int) -> None:
    """Write a row for each image: its path, and its likeliest classes or what is wrong with it."""
    columns = ["path"]
    for rank in range(1, count + 1):
        end = "" if rank == 1 else f"_{rank}"
        columns += [f"class{end}", f"probability{end}"]
    with (
        atomic_write(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*columns, "error"])
        for found in predictions:
            cells = [cell for name, p in found.likely for cell in (name, f"{p:.6f}")]
            cells += [""] * (len(columns) - 1 - len(cells))
            writer.writerow([found.path, *cells, found.error])


class _Files(Dataset[tuple[Tensor | None, int, str]]):
    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return self.transform(to_rgb(image)), index, ""
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return None, index, f"{path}: no image that can be read ({error})."


def _together(
    samples: list[tuple[Tensor | None, int, str]],
) -> tuple[Tensor | None, list[tuple[int, str]]]:
    images = [image for image, _, _ in samples if image is not None]
    reasons = [(index, reason) for _, index, reason in samples]
    return torch.stack(images) if images else None, reasons


def _likeliest(
    probabilities: Tensor, classes: Sequence[str], count: int
) -> tuple[tuple[str, float], ...]:
    values, indices = probabilities.topk(min(count, len(classes)))
    return tuple((classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True))
