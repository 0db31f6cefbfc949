"""Two processes on the CPU (gloo) train an injected network as one process does."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "distributed_worker.py"


def losses(mode: str, folder: Path) -> list[float]:
    launch = [] if mode == "single" else ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += (
        [] if mode == "single" else ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    )
    result = subprocess.run(
        [sys.executable, *launch, str(WORKER), mode, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(folder.joinpath(f"{mode}.json").read_text())


def test_ddp_and_fsdp_give_the_loss_curve_of_one_process(tmp_path: Path) -> None:
    """The worker also asserts what cannot be seen here: sharded blocks, equal outputs after a
    distributed checkpoint, a refusal to take SE blocks out of a sharded model.
    """
    alone = losses("single", tmp_path)
    assert alone[-1] < alone[0]
    for mode in ("ddp", "fsdp"):
        assert losses(mode, tmp_path) == pytest.approx(alone, rel=1e-5)


# --- the command, on a folder of images ----------------------------------------------------------


def launched(processes: int, output: Path, *options: str) -> list[dict[str, float]]:
    """The rows of metrics.csv after ``se-inject finetune`` in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    result = subprocess.run(
        [
            *(sys.executable, *(torchrun if processes > 1 else []), "-m", "se_inject"),
            *("finetune", "test_resnet", "--no-pretrained", "--img-size", "32"),
            *("--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--workers", "0"),
            *("--lr", "1e-2"),
            *("--devices", str(processes), "--output", str(output), *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Best weights") == 1  # only the first process speaks
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(row[k]) for k in ("train_loss", "val_loss", "val_acc")} for row in rows]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 20 images; five of each are left to validate, which two cannot share."""
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


def test_finetune_in_two_processes_is_that_of_one(photos: Path, tmp_path: Path) -> None:
    data = ("--data", str(photos), "--val-split", "0.25")
    alone = launched(1, tmp_path / "alone", *data)
    ddp = launched(2, tmp_path / "ddp", *data)
    fsdp = launched(2, tmp_path / "fsdp", *data, "--strategy", "fsdp")
    # While the base is frozen nothing depends on how the batch is divided ...
    assert ddp[0] == pytest.approx(alone[0], rel=1e-4)
    assert fsdp[0] == pytest.approx(alone[0], rel=1e-4)
    # ... after that BatchNorm sees the images of its own process, with both strategies.
    assert ddp[1] == pytest.approx(alone[1], rel=0.3)
    assert fsdp[1] == pytest.approx(ddp[1], rel=1e-4)
    # The best weights are whole, though they were sharded.
    tensors = [load_file(tmp_path / run / "best.safetensors") for run in ("ddp", "fsdp")]
    shapes = [{name: tensor.shape for name, tensor in file.items()} for file in tensors]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_without_an_image_keeps_step(strategy: str, photos: Path, tmp_path: Path) -> None:
    """One image a process: that of an unreadable one has nothing to learn from in that step."""
    for label in ("a", "b"):
        for i in range(3, 20):
            (photos / label / f"{i}.png").unlink()
        (photos / label / "2.png").write_bytes(b"no image")
    options = ("--data", str(photos), "--val-split", "0.4", "--batch-size", "2", "--img-size", "64")
    rows = launched(2, tmp_path / "run", *options, "--strategy", strategy)
    assert len(rows) == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["unreadable"]) == 2
