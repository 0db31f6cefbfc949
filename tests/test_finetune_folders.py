"""Run folders: one writer, damaged files, leftovers, edited settings, more epochs."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import started
from rich.console import Console
from test_finetune_data import SETTINGS, tree

from se_inject import ArgumentError, CheckpointError, TrainingError
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.options.config import read_config, write_config
from se_inject.finetune.runs import lock
from se_inject.finetune.runs import trainer as running
from se_inject.finetune.runs.lock import only_writer
from se_inject.finetune.training import machine
from se_inject.finetune.training.recipe import Recipe

QUIET = Console(quiet=True)
Here = Callable[..., tuple[int, str, str]]

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings(
        *("ignore::DeprecationWarning", "ignore::FutureWarning"),
        *("ignore:.*:UserWarning:lightning", "ignore:Checkpoint directory"),
    ),
]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- one writer ----------------------------------------------------------------------------------

HOLD = """
import signal
import sys
from pathlib import Path
from se_inject.finetune.runs.lock import only_writer
with only_writer(Path(sys.argv[1])):
    Path(sys.argv[2]).touch()
    signal.pause()
"""


def test_a_second_writer_is_told_who_the_first_is(run: Path, here: Here, tmp_path: Path) -> None:
    first = started(HOLD, str(run), str(tmp_path / "held"))
    while not (tmp_path / "held").exists():
        assert first.exitcode is None
        time.sleep(0.05)
    said = f"being written to by process {first.pid} on {platform.node()}"
    with pytest.raises(ArgumentError, match=said):
        running.start(SETTINGS, run, QUIET)
    status, _, err = here("finetune", "--resume", str(run))
    assert (status, len(err.splitlines())) == (1, 1)
    assert said in err
    first.kill()
    first.join()
    assert (run / lock.HOLDER).exists()
    assert here("finetune", "--resume", str(run))[0] == 0  # the system let go of it
    assert not (run / lock.HOLDER).exists()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), only_writer(tmp_path):
        raise ValueError("x")
    with only_writer(tmp_path):
        assert json.loads((tmp_path / lock.HOLDER).read_text())["pid"] == os.getpid()


def test_what_killed_writes_left_is_swept(run: Path) -> None:
    left = [run / ".se-inject-00000000-1-x.part", run / "se-0" / ".se-inject-0badcafe-77-y.part"]
    for path in left:
        path.write_bytes(b"half")
    kept = run / "se-0" / "notes.part"
    kept.write_bytes(b"mine")
    running.resume(run, QUIET)
    assert [path.exists() for path in (*left, kept)] == [False, False, True]


# --- damaged files -------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[str, str]] = {
    "empty": ("", "config.json is damaged"),
    "no JSON": ("{", "config.json is damaged"),
    "a list": ("[1]", "config.json is damaged"),
    "nothing in it": ("{}", "it has no model"),
    "a wrong type": (
        '{"model": "test_resnet", "epochs": "3"}',
        "epochs is '3', but must be a",
    ),
    "a truth": ('{"model": "test_resnet", "seeds": true}', "seeds is True, but must be a whole"),
    "a wrong name": (
        '{"model": "test_resnet", "epoch": 3}',
        "'epoch' is not a setting .* 'epochs'",
    ),
    "an unknown value": (
        '{"model": "test_resnet", "train": "everything"}',
        r"train is 'everything', but must be one of se, se\+head, all",
    ),
    "beyond a limit": ('{"model": "test_resnet", "batch_size": 0}', "--batch-size 0 must be 1 or"),
    "null": ('{"model": null}', "model is None, but must be a text"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_configuration_is_named(kind: str, tmp_path: Path) -> None:
    content, message = CONFIGS[kind]
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArgumentError, match=message) as caught:
        running.resume(tmp_path, QUIET)
    assert len(str(caught.value).splitlines()) <= 2
    if not message.startswith("--"):
        assert str(tmp_path / "config.json") in str(caught.value)
        assert "another --output folder" in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", '{"arm": "se"}', '{"arm": 3}', "nul"])
def test_a_damaged_arm_names_the_way_out(content: str, run: Path) -> None:
    path = run / "se-0" / "arm.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"se-0/arm\.json is damaged .*Remove it") as caught:
        running.resume(run, QUIET)
    assert len(str(caught.value).splitlines()) <= 2


def test_an_arm_is_read_from_its_checkpoint_again(run: Path) -> None:
    path = run / "se-0" / "arm.json"
    before = json.loads(path.read_text())
    path.unlink()
    running.resume(run, QUIET)
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize("content", ["", "{}", '{"classes": "ab"}', '{"classes": [1, 2]}'])
def test_a_damaged_summary_is_written_anew(content: str, run: Path) -> None:
    before = (run / "summary.json").read_text()
    (run / "summary.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged .* --resume"):
        use.load_run(run)
    running.resume(run, QUIET)
    assert (run / "summary.json").read_text() == before


@pytest.mark.parametrize("content", [None, b"", b"not a file of save_se"])
def test_missing_or_damaged_weights_are_named(content: bytes | None, run: Path) -> None:
    path = run / "best.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.safetensors") as caught:
        use.load_run(run)
    assert len(str(caught.value).splitlines()) <= 2
    running.resume(run, QUIET)  # the arm has them
    use.load_run(run)
    (run / "se-0" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"se-0/best\.safetensors is missing\. Remove"):
        running.resume(run, QUIET)


def without(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != name}


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tensor": lambda c: torch.zeros(3),
    "no loops": lambda c: without(c, "loops"),
    "no weights": lambda c: without(c, "state_dict"),
    "another network": lambda c: c | {"state_dict": {"network.x": torch.zeros(3)}},
    "no optimizer": lambda c: without(c, "optimizer_states"),
    "no callbacks": lambda c: c | {"callbacks": [1]},
    "wrong settings": lambda c: c | {"callbacks": {"RunFolder": {"settings": 3}}},
    "no rows": lambda c: c | {"callbacks": {}},
    "wrong rows": lambda c: c | {"callbacks": {"RunFolder": {"rows": 3}}},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_with_wrong_contents_is_named(kind: str, run: Path) -> None:
    path = run / "se-0" / "last.ckpt"
    torch.save(CHECKPOINTS[kind](torch.load(path, weights_only=True)), path)
    (run / "se-0" / "arm.json").unlink()
    with pytest.raises(CheckpointError, match=r"se-0/last\.ckpt is damaged .*Remove it") as caught:
        running.resume(run, QUIET)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_finished_arm_needs_no_checkpoint(run: Path) -> None:
    (run / "se-0" / "last.ckpt").write_bytes(b"x")
    running.resume(run, QUIET)
    with pytest.raises(CheckpointError, match=r"se-0/last\.ckpt is damaged"):
        running.resume(run, QUIET, epochs=2)
    assert read_config(run).epochs == 1


# --- space ---------------------------------------------------------------------------------------


def test_what_is_there_already_takes_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Free:
        free = 20_000_000

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Free())
    machine.check_space(tmp_path, 600_000, SETTINGS)
    with pytest.raises(ArgumentError, match="20 MB are free, but the run needs about 24 MB"):
        machine.check_space(tmp_path, 600_000, replace(SETTINGS, ema=0.9))
    with pytest.raises(ArgumentError, match="20 MB are free, but the run needs about 29 MB"):
        machine.check_space(tmp_path, 900_000, SETTINGS)
    (tmp_path / "last.ckpt").write_bytes(bytes(10_000_000))
    machine.check_space(tmp_path, 900_000, SETTINGS)


# --- edits and more epochs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1.0, "clip": 3.0}, r"lr 0\.001 is now 1\.0, clip 1\.0 is now 3\.0"),
        ({"model": "test_resnet2"}, "model 'test_resnet' is now"),
        ({"control": False}, "control True is now False"),
        ({"seed": 3}, "seed 0 is now 3"),
    ],
)
def test_an_edit_that_changes_what_is_learnt_is_refused(
    change: dict[str, Any], named: str, run: Path
) -> None:
    edit(run / "config.json", **change)
    with pytest.raises(ArgumentError, match=rf"config\.json was edited after .*{named}"):
        running.resume(run, QUIET)


def test_harmless_edits_are_obeyed(run: Path, tmp_path: Path) -> None:
    moved = tree(tmp_path / "moved", "a", "b")
    edit(run / "config.json", workers=1, data=str(moved), seeds=2)
    summary = running.resume(run, QUIET)
    assert len(summary["arms"]["se"]["val_acc"]) == 2
    assert (run / "control-1" / "arm.json").exists()
    edit(run / "config.json", seeds=1)
    with pytest.raises(ArgumentError, match="seeds 2 is now 1"):
        running.resume(run, QUIET)


def test_a_finished_run_is_trained_for_longer(
    run: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is then the same as one that was stopped while it was extended."""
    other = shutil.copytree(run, run.parent / "other")
    status, out, err = here("finetune", "--resume", str(run), "--epochs", "3")
    assert status == 0, err
    assert "of 3 epochs" in out
    assert read_config(run).epochs == 3
    result = json.loads((run / "control-0" / "arm.json").read_text())
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    status, _, err = here("finetune", "--resume", str(run), "--epochs", "2")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "has 3 epochs already" in err
    step = Recipe.training_step

    def stop(self: Recipe, batch: Any, index: int) -> Any:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "training_step", stop)
        with pytest.raises(TrainingError, match="stopped"):
            running.resume(other, QUIET, epochs=3)
    running.resume(other, QUIET)
    one, two = (
        torch.load(r / "se-0" / "last.ckpt", weights_only=True)["state_dict"] for r in (run, other)
    )
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    (run / "se-0" / "last.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt is missing, so --epochs 5 cannot"):
        running.resume(run, QUIET, epochs=5)


def test_what_an_old_run_did_not_keep_is_not_asked(run: Path) -> None:
    for path in run.glob("*/arm.json"):
        data = json.loads(path.read_text())
        del data["settings"]
        path.write_text(json.dumps(data))
    for path in run.glob("*/last.ckpt"):
        path.unlink()
    write_config(replace(read_config(run), lr=0.5), run)
    running.resume(run, QUIET)
