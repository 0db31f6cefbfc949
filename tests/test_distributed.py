"""Two processes on the CPU (gloo) train an injected network as one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
