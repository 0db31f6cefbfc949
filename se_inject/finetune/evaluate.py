"""What a run is good for afterwards: measure its best network, and ask it about images."""

import csv
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from se_inject.api import remove_se
from se_inject.errors import DataError
from se_inject.finetune.config import read_config
from se_inject.finetune.data import data_of, transforms
from se_inject.finetune.folders import Folder
from se_inject.finetune.images import to_rgb
from se_inject.finetune.measure import by_class, measure
from se_inject.finetune.network import base_of, blocks_of, with_head
from se_inject.finetune.parts import Split, limited
from se_inject.finetune.records import read_classes
from se_inject.finetune.settings import Settings
from se_inject.finetune.split import open_split, trained_names
from se_inject.finetune.trust import check_code
from se_inject.keep.atomic import atomic_write
from se_inject.keep.load import load_se
from se_inject.keep.read import read_header


@dataclass(frozen=True)
class Trained:
    """The best network of a run, in eval mode, and what it was trained for."""

    network: nn.Module
    settings: Settings
    classes: tuple[str, ...]
    data_config: dict[str, Any]  # how timm prepares images for it

    def scores(self, images: Tensor) -> Tensor:
        """The scores of images [N, C, H, W], as [N, classes] in float32 on the CPU."""
        device = next(self.network.parameters()).device
        scores: Tensor = self.network(images.to(device))
        return scores.float().cpu()


def load_run(folder: Path, *, trust_code: bool = False) -> Trained:
    """The best network of a finished run.

    Args:
        trust_code: import the ``module:callable`` that the configuration names.

    Raises:
        ArgumentError: the folder has no finished run, or names code and is not trusted.
        CheckpointError: its files are damaged.
    """
    settings = read_config(folder)
    check_code(settings.model, folder, trusted=trust_code)
    classes = read_classes(folder)
    best = folder / "best.safetensors"
    # The file holds all that was trained; only a base that stayed frozen is fetched again.
    network, config = base_of(replace(settings, pretrained=False, checkpoint=None))
    network = with_head(network, len(classes))
    if read_header(best).differing(network):
        network, config = base_of(settings)
        if blocks_of(network):  # --checkpoint was of save_se
            remove_se(network)
        network = with_head(network, len(classes))
    load_se(network, best, se_layer=settings.se_layer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(network.eval().to(device), settings, classes, config)


@torch.no_grad()
def evaluate(run: Trained, folder: Path, data: str | None = None) -> dict[str, Any]:
    """The accuracy in all and by class; the confusion matrix goes into the run folder.

    Where ``data`` is given, all its images count unless it has a validation part of its own.
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
    _write_matrix(found.matrix, run.classes, folder)
    precision, recall, f1 = (column.tolist() for column in by_class(found.matrix))
    counts = found.matrix.sum(1).tolist()
    return found.to_dict() | {
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
    """How many of the images that are now validated on the run was trained on."""
    val = split.parts["val"]
    if not isinstance(val.source, Folder):
        return 0
    root = Path(run.settings.data)
    learnt = {(root / name).resolve() for name in trained_names(folder)}
    return sum((val.source.root / name).resolve() in learnt for name in val.names)


@torch.no_grad()
def predict(run: Trained, path: Path, count: int = 3) -> list[tuple[str, float]]:
    """The likeliest classes of one image, with their probabilities."""
    try:
        with Image.open(path) as image:
            pixels = to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: no image that can be read ({error}).") from error
    _, transform = transforms(run.settings, run.data_config)
    probabilities = run.scores(transform(pixels)[None]).softmax(1)[0]
    values, indices = probabilities.topk(min(count, len(run.classes)))
    return [(run.classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]


def _write_matrix(matrix: Tensor, classes: tuple[str, ...], folder: Path) -> None:
    """The rows of the table and of the picture are the true classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with atomic_write(folder / "confusion.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    size = min(20.0, 3 + 0.35 * len(classes))
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(matrix, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 50:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                color = "white" if value > matrix.max() / 2 else "black"
                axes.text(j, i, value, ha="center", va="center", fontsize=8, color=color)
    with atomic_write(folder / "confusion.png") as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
