"""Measures images per second and peak memory of fine-tuning, with and without SE blocks.

    python benchmarks/finetune.py [MODEL] [--data DIR] [--batch-size 256] [--output FILE.json]

Each figure is that of the last epoch of ``se-inject finetune``, which uses bf16 and channels last
on a GPU. There the network is also measured with ``torch.compile``. The images are random noise in
8 classes unless ``--data`` says otherwise, so the accuracies mean nothing. All arms run one after
the other in one process, and their speeds are compared with that of the network without SE.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from se_inject.finetune.options.settings import Settings
from se_inject.finetune.runs.trainer import start


def noise(folder: Path, images: int) -> str:
    """Write JPEG files of noise with 256x256 pixels."""
    random = np.random.default_rng(0)
    for i in range(images):
        pixels = random.integers(0, 255, (256, 256, 3), dtype=np.uint8)
        path = folder / f"class{i % 8}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=80)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--data")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or noise(Path(folder) / "noise", options.images)
        # On a CPU the compiler takes longer than the run.
        for compiled in (False, True) if torch.cuda.is_available() else (False,):
            settings = Settings(
                options.model,
                data=data,
                pretrained=False,
                epochs=options.epochs,
                freeze_epochs=0,
                batch_size=options.batch_size,
                img_size=options.img_size,
                workers=options.workers,
                control=True,
                compile=compiled,
            )
            run = Path(folder) / f"run-{compiled}"
            start(settings, run, Console(stderr=True))
            for arm in ("se", "control"):
                result = json.loads((run / f"{arm}-0" / "arm.json").read_text())
                rows.append(
                    {
                        "arm": arm,
                        "compiled": compiled,
                        "images_per_s": result["history"][-1]["images_per_s"],
                        "peak_bytes": result["peak_bytes"],
                    }
                )
    table = Table("arm", "compiled", "images/s", "peak memory", "speed : control", box=None)
    for row in rows:
        control = next(
            r for r in rows if r["arm"] == "control" and r["compiled"] == row["compiled"]
        )
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
        ratio = row["images_per_s"] / control["images_per_s"]
        table.add_row(
            row["arm"],
            str(row["compiled"]),
            f"{row['images_per_s']:.0f}",
            memory,
            f"{ratio:.3f}",
        )
    Console().print(table)
    if options.output:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        options.output.write_text(
            json.dumps(
                {"model": options.model, "device": gpu, "versions": versions, "rows": rows},
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
