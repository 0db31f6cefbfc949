"""What several test files share: the devices, and networks with statistics worth comparing."""

import gc
import os
import sys

# So that cuBLAS can be deterministic: the CUDA tests compare to the bit.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Tests never reach a hub: what they use ships inside packages.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker on its own core, the processes that it starts too.
    os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from se_inject.cli import app as cli


def pytest_collection_finish() -> None:
    """Take what all imports made out of the garbage collector's rounds.

    These are half a million objects that stay, and each full round would look at all of them: up to
    a sixth of the time of tests that make many small objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test that asks for it runs on the CPU and, under the marker ``gpu``, on CUDA."""
    if request.param == "cpu":
        yield "cpu"
        return
    # Comparisons to the bit need the same algorithm twice, those to 1e-6 whole float32 products.
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield request.param


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """The same seed for each test; a Trainer's deterministic algorithms end with its test."""
    torch.manual_seed(0)
    yield
    if torch.are_deterministic_algorithms_enabled():  # to turn them off imports torch's compiler
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``se-inject ARGS`` in this process, 80 columns wide: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["se-inject", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def here() -> Callable[..., tuple[int, str, str]]:
    """``se-inject ARGS`` in this process: exit status, stdout and stderr, warnings among it."""
    from commands import command

    def here(*args: str) -> tuple[int, str, str]:
        result = command(*args)
        return result.returncode, result.stdout, result.stderr

    return here


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of runs have empty pictures: to draw them takes longer than a small run does.

    For files that ask nothing of a page; test_page.py and test_finetune_figures.py draw.
    """
    empty = '<svg role="img"></svg>'
    monkeypatch.setattr("se_inject.finetune.after.page_figures.inline_svg", lambda *_: empty)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning run of two arms, one epoch each; tests work on copies."""
    from dataclasses import replace

    from rich.console import Console
    from test_finetune_data import settings_of, tree

    from se_inject.finetune.runs.trainer import start

    root = tmp_path_factory.mktemp("finished")
    data = tree(root / "data", "a", "b")
    start(replace(settings_of(data), control=True), root / "run", Console(quiet=True))
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")
