"""The images of evidence.py. The seed draws the training images, and the test images stay the same.

Fashion-MNIST comes from Debian's package ``dataset-fashion-mnist``. ELPV has photographs of solar
cells, intact or defective. It comes from ``pip install elpv-dataset``, and its licence (CC
BY-NC-SA) does not allow it to be in this repository. The digits come from scikit-learn.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from evidence_list import Sizes
from PIL import Image

from se_inject.finetune.data.parts import Part, Split
from se_inject.finetune.data.sources import InMemory

FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CELL = 64  # pixels; the cells of 300 x 300 pixels are scaled down to this side once


def _fashion() -> tuple[InMemory, InMemory]:
    from fashion_mnist import CLASSES, read_idx

    def part(stem: str) -> InMemory:
        labels = read_idx(FASHION / f"{stem}-labels-idx1-ubyte.gz")
        images = read_idx(FASHION / f"{stem}-images-idx3-ubyte.gz")
        return InMemory(images, labels.tolist(), CLASSES)

    return part("train"), part("t10k")


def _elpv() -> tuple[InMemory, InMemory]:
    from elpv_dataset.utils import load_dataset

    images, probability, _ = load_dataset()
    small = [Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BOX) for image in images]
    labels = (probability > 0.5).astype(int)
    return _divided(np.stack([np.asarray(image) for image in small]), labels, ("intact", "defect"))


def _digits() -> tuple[InMemory, InMemory]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    return _divided(pixels, digits.target, tuple(map(str, range(10))))


def _divided(
    pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> tuple[InMemory, InMemory]:
    """Keep a quarter for the test, chosen at random but always the same, and train on the rest."""
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [len(order) // 4])
    made = [InMemory(pixels[part], labels[part].tolist(), classes) for part in (train, test)]
    return made[0], made[1]


SETS: dict[str, Callable[[], tuple[InMemory, InMemory]]] = {
    "fashion": _fashion,
    "elpv": _elpv,
    "digits": _digits,
}


@cache
def images_of(data: str) -> tuple[InMemory, InMemory]:
    """The training images and the test images."""
    return SETS[data]()


def split_of(data: str, sizes: Sizes, seed: int, *, test: bool) -> Split:
    """The images of a run: training images that the seed draws, and the first test images.

    The seeds differ in their images too, so an interval over the seeds says what to expect of other
    images of the same kind. All arms of a seed have the same images.

    Args:
        test: whether the run may see the test images.
    """
    pool, others = images_of(data)
    order = np.random.default_rng(seed).permutation(len(pool)).tolist()
    val = min(sizes.val, sizes.watched) if test else sizes.val
    chosen = {"train": order[: sizes.train], "val": order[sizes.train : sizes.train + val]}
    parts = {
        name: Part(pool, indices, [pool.labels[i] for i in indices])
        for name, indices in chosen.items()
    }
    if test:
        first = range(min(sizes.test, len(others)))
        parts["test"] = Part(others, first, [others.labels[i] for i in first])
    return Split(pool.classes, parts)
