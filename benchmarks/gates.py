"""Measures what ``gate_statistics`` costs more than a plain forward pass, side by side in one run.

    OMP_NUM_THREADS=1 python benchmarks/gates.py [--images 10000] [--classes 1000] [--json FILE]

1. Memory: the peak of a process that runs all images and sums up the gates, minus the peak of a
   process that only runs them. Both make random images batch by batch, so that no data set takes
   memory. Small images are enough, because gates have the same size for every image.
2. Time: batches of ``--size`` pixels run with and without the statistics in turns. The ratio is the
   median over the pairs of batches, and the seconds are the processor time of the process.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from se_inject import inject_se
from se_inject.gates import gate_statistics

MEMORY_SIZE = 32  # pixels


def network(name: str) -> nn.Module:
    """Build a network whose gates depend on the image."""
    torch.manual_seed(0)
    model = inject_se(timm.create_model(name)).eval()
    for key, p in model.named_parameters():
        if ".se.fc2" in key:
            nn.init.normal_(p, std=0.1)
    return model


def batches(images: int, batch: int, classes: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random images, whose classes take turns."""
    for first in range(0, images, batch):
        labels = torch.arange(first, min(first + batch, images)) % classes
        yield torch.randn(len(labels), 3, size, size), labels


def peak_bytes(options: argparse.Namespace, with_gates: bool, queue: Any) -> None:
    """Run all images, and put the peak memory of this process into the queue."""
    model = network(options.model)
    data = batches(options.images, options.batch_size, options.classes, MEMORY_SIZE)
    if with_gates:
        found = gate_statistics(model, data, options.classes)
        assert found.images == options.images
    else:
        with torch.no_grad():
            for x, _ in data:
                model(x)
    queue.put(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Measure each arm in a process of its own, because a peak never goes down again."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for with_gates in (False, True):
        queue = context.Queue()
        process = context.Process(target=peak_bytes, args=(options, with_gates, queue))
        process.start()
        peaks.append(queue.get() / 1e6)
        process.join()
    return {"plain_mb": peaks[0], "gates_mb": peaks[1], "added_mb": peaks[1] - peaks[0]}


def timing(options: argparse.Namespace) -> dict[str, float]:
    """Time the batches of one call of ``gate_statistics``, with a plain batch before each."""
    model = network(options.model)
    plain: list[float] = []
    batch = options.batch_size
    data = next(batches(batch, batch, options.classes, options.size))
    started: list[float] = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(options.pairs + 1):
            if i:
                ends.append(time.process_time())
            start = time.process_time()
            with torch.no_grad():
                model_plain(data[0])
            plain.append(time.process_time() - start)
            started.append(time.process_time())
            yield data
        ends.append(time.process_time())

    ends: list[float] = []
    model_plain = network(options.model)  # this one has no hooks
    gate_statistics(model, loader(), options.classes)
    recorded = [end - start for start, end in zip(started, ends, strict=True)]
    ratios = sorted(a / b for a, b in zip(recorded[1:], plain[1:], strict=True))
    return {
        "plain_s": statistics.median(plain[1:]),
        "gates_s": statistics.median(recorded[1:]),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels, of the timed images")
    parser.add_argument("--pairs", type=int, default=5, help="timed batches of each arm")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    held = memory(options)
    print(f"{held['added_mb']:.0f} MB more than a plain forward pass", flush=True)
    results = {"memory": held, "time": timing(options)}
    spent = results["time"]
    print(
        f"{options.model}, {options.images} images of {options.classes} classes:"
        f" {held['added_mb']:.0f} MB more than a plain forward pass ({held['plain_mb']:.0f} MB);"
        f" time x {spent['ratio']:.3f} ({spent['ratio_min']:.3f} to {spent['ratio_max']:.3f})"
    )
    if options.json:
        environment = {
            "date": datetime.now(UTC).date().isoformat(),
            "arguments": {k: v for k, v in vars(options).items() if k != "json"},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        options.json.write_text(json.dumps({**environment, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
