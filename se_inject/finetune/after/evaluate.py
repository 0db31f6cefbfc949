"""Measures the chosen network of a finished run on images."""

import csv
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from se_inject.errors import DataError
from se_inject.finetune.after.predict import predict
from se_inject.finetune.after.trained import Trained, load_run
from se_inject.finetune.data.folders import Folder
from se_inject.finetune.data.loading import data_of
from se_inject.finetune.data.parts import Split, limited
from se_inject.finetune.data.split import open_split, trained_names
from se_inject.finetune.figures.measure import by_class, measure
from se_inject.finetune.figures.pictures import confusion_picture
from se_inject.keep.atomic import atomic_write

__all__ = ["evaluate", "load_run", "predict"]  # what the commands need for a finished run


def evaluate(run: Trained, folder: Path, data: str | None = None) -> dict[str, Any]:
    """Measure the accuracy overall and by class, and write the confusion matrix into the folder.

    Args:
        data: other data to measure on: their validation part or, if they have none, all of their
            images. Their matrix is written beside that of the run.

    Raises:
        DataError: the other data have other classes.
    """
    settings = run.settings if data is None else replace(run.settings, data=data)
    split = open_split(settings, folder) if data is None else open_split(settings, whole=True)
    if data is None:
        split = limited(split, settings.limit)
    opened = data_of(split, settings, run.data_config, settings.seed)
    if data is not None and (known := _trained_on(run, folder, split)):
        warnings.warn(f"{known} of these images were trained on in this run.", stacklevel=2)
    if opened.classes != run.classes:
        raise DataError(
            f"the classes of {settings.data} are not those of the run:"
            f" {', '.join(opened.classes[:3])}, ... and {', '.join(run.classes[:3])}, ..."
        )
    found = measure(run.scores, opened.val, settings, len(run.classes))
    files = _write_matrix(found.matrix, run, folder, data)
    precision, recall, f1 = (column.tolist() for column in by_class(found.matrix))
    counts = found.matrix.sum(1).tolist()
    return found.to_dict() | {
        "arm": run.arm,
        "files": [str(path) for path in files],
        "unreadable": found.unreadable,
        # The accuracy of a class is its recall.
        "classes": {name: recall[i] if counts[i] else None for i, name in enumerate(run.classes)},
        "by_class": {
            name: {
                "images": counts[i],
                "precision": precision[i],
                "recall": recall[i] if counts[i] else None,
                "f1": f1[i] if counts[i] else None,
                "auroc": found.auroc[i],
            }
            for i, name in enumerate(run.classes)
        },
    }


def _trained_on(run: Trained, folder: Path, split: Split) -> int:
    """The number of images that are measured now although the run was trained on them."""
    val = split.parts["val"]
    if not isinstance(val.source, Folder):
        return 0
    root = Path(run.settings.data)
    learnt = {(root / name).resolve() for name in trained_names(folder)}
    return sum((val.source.root / name).resolve() in learnt for name in val.names)


def _write_matrix(
    matrix: Tensor, run: Trained, folder: Path, data: str | None
) -> tuple[Path, Path]:
    """Write the matrix as a table and as a picture, whose rows are the true classes.

    With other data, the names of both files end with the name of the data.
    """
    name = "confusion" + ("" if run.arm == run.settings.arms[0] else f"-{run.arm}")
    if data is not None:
        name += "-of-" + (re.sub(r"[^\w.-]+", "-", Path(data).resolve().name) or "data")
    table, picture = folder / f"{name}.csv", folder / f"{name}.png"
    with atomic_write(table) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *run.classes])
        writer.writerows(
            [name, *row] for name, row in zip(run.classes, matrix.tolist(), strict=True)
        )
    confusion_picture(matrix, run.classes, picture)
    return table, picture
