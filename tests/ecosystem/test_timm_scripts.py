"""timm's own scripts on an injected model.

They are in timm's repository and not in its package. Name the folder where they are in the
environment variable SE_INJECT_TIMM_SCRIPTS.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import se_inject.timm  # noqa: F401  # its import registers the names

SCRIPTS = os.environ.get("SE_INJECT_TIMM_SCRIPTS")
MODEL = ["--model", "se_inject_test_resnet", "--model-kwargs", "r=4", "placement=pre"]
SMALL = ["--img-size", "64", "--device", "cpu"]

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(not SCRIPTS, reason="needs timm's scripts: SE_INJECT_TIMM_SCRIPTS"),
]


def run(script: str, *arguments: str) -> str:
    assert SCRIPTS
    ran = subprocess.run(
        [sys.executable, "-m", "se_inject.timm", str(Path(SCRIPTS) / script), *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split in ("train", "validation"):
        for k, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                image = draw.integers(0, 80, (72, 72, 3), dtype=np.uint8)
                image[..., k] += 120
                Image.fromarray(image).save(root / split / name / f"{name}{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of train.py of one epoch."""
    out = tmp_path_factory.mktemp("out")
    run(
        *("train.py", str(images), *MODEL, *SMALL, "--num-classes", "3", "--epochs", "1"),
        *("-b", "8", "-j", "1", "--output", str(out), "--experiment", "run", "--model-ema"),
    )
    return out / "run"


def test_train_and_resume(trained: Path, images: Path, tmp_path: Path) -> None:
    said = run(
        *("train.py", str(images), *MODEL, *SMALL, "--num-classes", "3", "--epochs", "2"),
        *("-b", "8", "-j", "1", "--output", str(tmp_path), "--experiment", "run"),
        *("--resume", str(trained / "last.pth.tar")),
    )
    assert "Loaded checkpoint" in said
    assert (tmp_path / "run" / "model_best.pth.tar").exists()


def test_validate(trained: Path, images: Path) -> None:
    said = run(
        *("validate.py", str(images), "--split", "validation", *MODEL, *SMALL),
        *("--num-classes", "3", "-j", "1", "--checkpoint", str(trained / "last.pth.tar")),
    )
    assert '"top1":' in said


def test_benchmark() -> None:
    count = ["--num-warm-iter", "1", "--num-bench-iter", "10", "-b", "2"]
    said = run("benchmark.py", *MODEL, *SMALL, "--bench", "both", *count)
    assert '"train_samples_per_sec"' in said


def test_inference(trained: Path, images: Path, tmp_path: Path) -> None:
    run(
        *("inference.py", str(images / "validation"), *MODEL, *SMALL, "--num-classes", "3"),
        *("-j", "1", "--checkpoint", str(trained / "last.pth.tar")),
        *("--results-dir", str(tmp_path), "--results-format", "csv"),
    )
    assert list(tmp_path.glob("*.csv"))


def test_its_checkpoint_builds_the_network(trained: Path) -> None:
    model = timm.create_model(
        "se_inject_test_resnet",
        r=4,
        placement="pre",
        num_classes=3,
        checkpoint_path=trained / "last.pth.tar",
    ).eval()
    saved = torch.load(trained / "last.pth.tar", weights_only=False)["state_dict_ema"]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
