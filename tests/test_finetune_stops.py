"""Wrong options, damaged files and foreign run folders: one clear error, and no code is run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import command
from test_finetune import BEFORE_ROOMS, QUIET
from test_finetune_data import COMMAND, SETTINGS, settings_of, tree

from se_inject import ArgumentError, CheckpointError
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.options.trust import check_code, printable
from se_inject.finetune.runs import trainer as running

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings(
        *("ignore::DeprecationWarning", "ignore::FutureWarning"),
        *("ignore:.*:UserWarning:lightning", "ignore:Checkpoint directory"),
    ),
]


# --- code from a run folder ----------------------------------------------------------------------


def hostile(root: Path) -> Path:
    """A run folder that names code which lies beside its configuration."""
    run = root / "x"
    shutil.copytree(BEFORE_ROOMS / "stopped", run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": "x.payload:build"}))
    (run / "summary.json").write_text(json.dumps({"classes": ["a", "b"]}))
    mark = f"import pathlib; pathlib.Path({str(root / 'ran')!r}).touch()\n"
    (run / "payload.py").write_text(mark)
    (run / "__init__.py").write_text(mark)
    return run


@pytest.mark.parametrize("trusted", [False, True])
def test_a_run_folder_brings_no_code_of_its_own(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hostile(tmp_path)
    monkeypatch.chdir(tmp_path)
    message = "in the run folder itself" if trusted else "add --trust-code"
    with pytest.raises(ArgumentError, match=message):
        use.load_run(run, trust_code=trusted)
    with pytest.raises(ArgumentError, match=message):
        running.resume(run, QUIET, trust_code=trusted)
    assert not (tmp_path / "ran").exists()


def test_predict_on_a_foreign_run_folder_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hostile(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as with ``python -m se_inject``
    for args in (("predict", str(run), "image.png"), ("predict", "x", "i.png", "--trust-code")):
        result = command(*args)
        assert result.returncode == 1
        assert "names code" in result.stderr
        assert len(result.stderr.splitlines()) <= 2
    assert not (tmp_path / "ran").exists()


def test_code_from_elsewhere_is_imported_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hostile(tmp_path)
    for inside in (run, tmp_path):
        monkeypatch.chdir(inside)
        with pytest.raises(ArgumentError, match="in the run folder itself"):
            check_code("payload:build" if inside == run else "x.payload:build", run, trusted=True)
    check_code("torchvision.models:resnet18", run, trusted=True)
    check_code("no_such_module:build", run, trusted=True)  # said where it is imported
    check_code("resnet18", run, trusted=False)
    check_code("hf-hub:timm/resnet18", run, trusted=False)


def test_control_characters_are_not_printed_raw() -> None:
    assert printable("a\x1b[31mred\n") == "a\\x1b[31mred\\n"
    assert printable("Füße 猫") == "Füße 猫"


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": float("nan")}, "--lr nan must be above 0"),
        ({"lr": -1.0}, "--lr -1.0 must be above 0"),
        ({"ema": 1.0}, "--ema 1.0 must be at least 0 and below 1"),
        ({"seed": -1}, "--seed -1 must be between 0"),
        ({"seed": 2**32}, "--seed 4294967296 must be between 0"),
        ({"devices": "0"}, "--devices 0 is not a number of devices"),
        ({"devices": "many"}, "--devices many is not a number"),
        ({"weight_decay": float("nan")}, "--weight-decay nan must be 0 or more"),
        ({"clip": float("inf")}, "--clip inf must be 0 or more"),
        ({"aa": "nonsense"}, "--aa nonsense is not an augmentation of timm"),
        ({"aa": "rand-q9"}, "--aa rand-q9 is not an augmentation of timm"),
        (
            {"precision": "nonsense"},
            "Lightning cannot train with --precision nonsense and --devices auto",
        ),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = tree(tmp_path / "data", "a", "b")
    with pytest.raises(ArgumentError, match=message):
        running.start(replace(settings_of(root), **change), tmp_path / "run", QUIET)


@pytest.mark.parametrize(
    "change", [{"aa": "rand-m9-mstd0.5"}, {"aa": "augmix-m3-w3"}, {"aa": "original"}]
)
def test_augmentations_of_timm_are_taken(change: dict[str, Any], tmp_path: Path) -> None:
    from se_inject.finetune.data.loading import transforms

    assert transforms(replace(SETTINGS, **change), {"input_size": (3, 32, 32)})


# --- damaged files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_arm")
    root = tree(folder / "data", "a", "b")
    result = command(*COMMAND, "--data", str(root), "--output", str(folder / "run"))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04 half a file"])
def test_a_damaged_checkpoint_names_the_way_out(
    content: bytes, one_arm: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(one_arm, tmp_path / "run")
    (run / "arm.json").unlink()
    (run / "last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged .*\. Remove it to train"):
        running.resume(run, QUIET)
    (run / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"last\.ckpt is missing, so this arm begins again"):
        running.resume(run, QUIET)
