"""Files that versions from before the rooms wrote still load: see tests/data/README.md."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import command
from safetensors.torch import load_file
from small_net import build

from se_inject import load_se, remove_se, save_se
from se_inject.edit.block_class import Edit, edit_of
from se_inject.old_paths import OLD_PATHS

TESTS = Path(__file__).parent
OLD = TESTS / "data" / "before_rooms"


def expected() -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(OLD / "outputs.safetensors")
    return tensors["x"], tensors["y"]


@torch.no_grad()
def test_a_pickle_of_an_injected_model_loads() -> None:
    x, y = expected()
    model = torch.load(OLD / "model.pt", weights_only=False)
    torch.testing.assert_close(model(x), y)
    block = model.blocks[0]
    assert type(block).__name__ == "SEBlock"
    assert isinstance(edit_of(block), Edit)
    base = build().eval()
    torch.testing.assert_close(remove_se(model)(x), base(x))


def test_what_was_unpickled_is_pickled_and_saved_with_the_names_of_today(tmp_path: Path) -> None:
    x, y = expected()
    torch.save(torch.load(OLD / "model.pt", weights_only=False), tmp_path / "model.pt")
    assert b"se_inject.generated" not in (tmp_path / "model.pt").read_bytes()
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    save_se(again, tmp_path / "se.safetensors")
    torch.testing.assert_close(load_se(build().eval(), tmp_path / "se.safetensors")(x), y)


def test_a_pickle_loads_in_a_process_that_imported_nothing() -> None:
    program = f"""
import torch
model = torch.load({str(OLD / "model.pt")!r}, weights_only=False)
print(type(model.blocks[0]).__name__)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(TESTS)]))},
    )
    assert result.stdout == "SEBlock\n"


@torch.no_grad()
def test_a_file_of_save_se_loads() -> None:
    x, y = expected()
    torch.testing.assert_close(load_se(build().eval(), OLD / "se.safetensors")(x), y)


OLD_NAMES = {
    "generated": ("Edit", "ForwardSource", "Settings", "_Module", "_forward_source", "_remake"),
    "variants": ("Variant", "SqueezeFunction", "GateFunctions"),
    "squeeze_excite": ("SqueezeExcite", "Layout", "SECost"),
    "trace": ("expect",),
    "inject": ("remove_se", "inject_se"),
    "attention": ("Attention",),
    "plan": ("Plan", "Site", "Skipped"),
    "sites": ("Reason",),
    "checkpoint": ("save_se", "load_se"),
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_names_are_found_where_they_live_today(old: str) -> None:
    homes = {f"se_inject.{home}" for home in OLD_PATHS[old]}
    for name in OLD_NAMES[old]:
        found = getattr(sys.modules[f"se_inject.{old}"], name)
        assert (found.__name__, found.__module__ in homes) == (name, True)


def test_an_old_module_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match=r"'se_inject\.generated' has no attribute 'nothing'"):
        _ = sys.modules["se_inject.generated"].nothing  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = sys.modules["se_inject.plan"].nothing  # type: ignore[attr-defined]


# --- run folders ---------------------------------------------------------------------------------


def said_by(*args: str) -> str:
    """What ``se-inject ARGS`` prints in this process, which can import ``small_net``."""
    result = command(*args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.usefixtures("no_pictures")
def test_evaluate_and_predict_of_a_finished_run(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    run = tmp_path / "run"
    shutil.copytree(OLD / "finished", run)
    said = json.loads(said_by("evaluate", str(run), "--json", "--trust-code"))
    summary = json.loads((OLD / "finished" / "summary.json").read_text())
    assert said["top1"] == pytest.approx(summary["arms"]["se"]["mean"], rel=1e-3)
    from PIL import Image

    pixels = load_digits().images[0]
    Image.fromarray((pixels * 16).clip(0, 255).astype("uint8")).save(tmp_path / "digit.png")
    assert "digit.png" in said_by("predict", str(run), str(tmp_path / "digit.png"), "--trust-code")


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_run_goes_on_as_the_old_version_did(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "stopped", run)
    said_by("finetune", "--resume", str(run), "--trust-code")
    got, wanted = (
        list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        for folder in (run, OLD / "went_on")
    )
    assert len(got) == len(wanted) == 3
    for a, b in zip(got, wanted, strict=True):
        assert (a["arm"], a["seed"], a["epoch"]) == (b["arm"], b["seed"], b["epoch"])
        for name in ("train_loss", "train_acc", "val_loss", "val_acc", "val_top5"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3), (name, a["epoch"])
