"""Two processes on the CPU (gloo) train an injected network as one process does."""

import csv
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from commands import command
from distributed_worker import train
from PIL import Image
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "distributed_worker.py"
TRAINING = (
    *("--no-pretrained", "--img-size", "32", "--epochs", "2", "--warmup-epochs", "1"),
    *("--batch-size", "8", "--workers", "0", "--lr", "1e-2"),
)


def finetune(data: Path, output: Path, processes: int, *options: str) -> tuple[str, ...]:
    options = ("--devices", str(processes), "--output", str(output), *options)
    return ("finetune", "test_resnet", "--data", str(data), *TRAINING, *options)


def photos(folder: Path, *, readable: int, unreadable: int) -> Path:
    """Two classes with so many images each."""
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(readable):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
        for i in range(readable, readable + unreadable):
            (folder / label / f"{i}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of each class are left to validate, which two processes cannot share."""
    return photos(tmp_path_factory.mktemp("many") / "photos", readable=20, unreadable=0)


@pytest.fixture(scope="module")
def ended(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one pair of processes that did every job, once the job named has ended well.

    The first job is in the environment that torchrun made, as the documented command is.
    """
    folder = tmp_path_factory.mktemp("pair")
    few = photos(folder / "few", readable=2, unreadable=1)
    # One image a process: that of an unreadable one has nothing to learn from in that step.
    one = ("--val-split", "0.4", "--batch-size", "2", "--img-size", "64")
    jobs = {
        "finetune-ddp": finetune(many, folder / "ddp", 2, "--val-split", "0.25"),
        "finetune-fsdp": finetune(
            many, folder / "fsdp", 2, "--val-split", "0.25", "--strategy", "fsdp"
        ),
        "few-ddp": finetune(few, folder / "few-run-ddp", 2, *one, "--strategy", "ddp"),
        "few-fsdp": finetune(few, folder / "few-run-fsdp", 2, *one, "--strategy", "fsdp"),
        "train-ddp": ("train", "ddp"),
        "train-fsdp": ("train", "fsdp"),
    }
    with ExitStack() as stack:  # all held at once, so that no two are the same
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in jobs]
        ports = [None, *(socket.getsockname()[1] for socket in sockets[1:])]
    told = {name: (port, jobs[name]) for name, port in zip(jobs, ports, strict=True)}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    result = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), json.dumps(told), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,  # only processes that wait for each other take so long
    )
    assert result.returncode == 0, result.stderr[-3000:]

    def ended(job: str) -> Path:
        for rank in range(2):
            printed = (folder / f"{job}-{rank}.txt").read_text()
            assert (folder / f"{job}-{rank}.status").read_text() == "0", printed[-3000:]
        return folder

    return ended


@pytest.fixture(scope="module")
def losses_alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train("single", tmp_path_factory.mktemp("single"))


def test_the_loss_falls(losses_alone: list[float]) -> None:
    assert losses_alone[-1] < losses_alone[0]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_ddp_and_fsdp_give_the_loss_curve_of_one_process(
    mode: str, losses_alone: list[float], ended: Callable[[str], Path]
) -> None:
    """The worker also asserts what cannot be seen here: sharded blocks, equal outputs after a
    distributed checkpoint, a refusal to take SE blocks out of a sharded model.
    """
    folder = ended(f"train-{mode}")
    losses = json.loads(folder.joinpath(f"train-{mode}.json").read_text())
    assert losses == pytest.approx(losses_alone, rel=1e-5)


# --- the command, on a folder of images ----------------------------------------------------------


def rows_of(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(row[k]) for k in ("train_loss", "val_loss", "val_acc")} for row in rows]


def test_finetune_in_two_processes_is_that_of_one(
    many: Path, tmp_path: Path, ended: Callable[[str], Path]
) -> None:
    result = command(*finetune(many, tmp_path / "alone", 1, "--val-split", "0.25"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Best weights") == 1
    for job in ("finetune-ddp", "finetune-fsdp"):  # only the first process speaks
        folder = ended(job)
        printed = [(folder / f"{job}-{rank}.txt").read_text() for rank in range(2)]
        assert [text.count("Best weights") for text in printed] == [1, 0]
    alone, ddp, fsdp = (
        rows_of(run) for run in (tmp_path / "alone", folder / "ddp", folder / "fsdp")
    )
    # While the base is frozen nothing depends on how the batch is divided ...
    assert ddp[0] == pytest.approx(alone[0], rel=1e-4)
    assert fsdp[0] == pytest.approx(alone[0], rel=1e-4)
    # ... after that BatchNorm sees the images of its own process, with both strategies.
    assert ddp[1] == pytest.approx(alone[1], rel=0.3)
    assert fsdp[1] == pytest.approx(ddp[1], rel=1e-4)
    # The best weights are whole, though they were sharded.
    tensors = [load_file(folder / run / "best.safetensors") for run in ("ddp", "fsdp")]
    shapes = [{name: tensor.shape for name, tensor in file.items()} for file in tensors]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_without_an_image_keeps_step(strategy: str, ended: Callable[[str], Path]) -> None:
    folder = ended(f"few-{strategy}")
    assert len(rows_of(folder / f"few-run-{strategy}")) == 2
    summary = json.loads((folder / f"few-run-{strategy}" / "summary.json").read_text())
    assert len(summary["unreadable"]) == 2
