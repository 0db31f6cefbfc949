"""Writes Fashion-MNIST as folders of PNG files, from the files of Debian's package.

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist.py fashion --train 2000 --val 1000
    se-inject finetune MODEL --data fashion

It takes the first images of each file, so that every run has the same ones.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("top", "trouser", "pullover", "dress", "coat")
CLASSES += ("sandal", "shirt", "sneaker", "bag", "boot")


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, the type, the number of dims, the dims, the values."""
    data = gzip.decompress(path.read_bytes())
    dims = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--train", type=int, default=2000, help="images (of 60,000)")
    parser.add_argument("--val", type=int, default=1000, help="images (of 10,000)")
    options = parser.parse_args()
    for part, stem, count in (
        ("train", "train", options.train),
        ("val", "t10k", options.val),
    ):
        images = read_idx(options.source / f"{stem}-images-idx3-ubyte.gz")[:count]
        labels = read_idx(options.source / f"{stem}-labels-idx1-ubyte.gz")[:count]
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = options.output / part / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:05}.png")
        print(f"{options.output / part}: {len(images)} images")


if __name__ == "__main__":
    main()
