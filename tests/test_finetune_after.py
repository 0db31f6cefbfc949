"""After training, and what is seen of it: evaluate, predict, export, progress, pictures, help."""

import argparse
import csv
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import timm
import torch
import typer
from PIL import Image
from rich.console import Console
from test_finetune_data import SETTINGS, put, tree

from se_inject import ArgumentError, CheckpointError
from se_inject.cli import app as cli
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.after.predict import images_of
from se_inject.finetune.figures import pictures
from se_inject.finetune.figures.pictures import confusion_picture, curves
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.options.trust import printable
from se_inject.finetune.training.progress import EpochBar, EpochLines
from se_inject.models.files import load_weights

Here = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.filterwarnings(
    *("ignore::DeprecationWarning", "ignore::FutureWarning"),
    *("ignore:.*:UserWarning:lightning", "ignore:Checkpoint directory"),
)


# --- predict -------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images in two folders, one that cannot be read, and junk."""
    root = tmp_path / "photos"
    for i in range(3):
        put(root / f"{i}.png", i)
    for i in range(2):
        put(root / "deeper" / f"{i}.jpg", 10 + i)
    (root / "broken.png").write_bytes(b"no image")
    (root / "._0.png").write_bytes(b"junk")
    (root / "notes.txt").write_text("text")
    return root


def test_a_folder_is_predicted_in_batches_and_the_unreadable_named(
    run: Path, photos: Path, tmp_path: Path, here: Here
) -> None:
    table = tmp_path / "out.csv"
    status, out, err = here(
        *("predict", str(run), str(photos), "--top", "1", "--batch-size", "2"),
        *("--csv", str(table)),
    )
    assert status == 1  # of one image
    assert err.count("error:") == 1
    assert "broken.png: no image that can be read" in err
    lines = out.splitlines()
    assert len(lines) == 5
    trained = use.load_run(run)
    for line in lines:
        path, name, share = re.fullmatch(r"(.*): (\w+) ([\d.]+) %", line).groups()  # type: ignore[union-attr]
        [(alone, p)] = use.predict(trained, Path(path), count=1)
        assert (name, float(share)) == (alone, pytest.approx(100 * p, abs=0.06))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class", "probability", "error"]
    assert len(rows) == 6
    assert [row["path"] for row in rows if row["error"]] == [str(photos / "broken.png")]


def test_globs_and_json(run: Path, photos: Path, here: Here) -> None:
    status, out, _ = here("predict", str(run), str(photos / "*" / "*.jpg"), "--json")
    assert status == 0
    said = json.loads(out)
    assert [Path(one["path"]).name for one in said] == ["0.jpg", "1.jpg"]
    for one in said:
        assert {found["class"] for found in one["predictions"]} == {"a", "b"}
        assert sum(found["probability"] for found in one["predictions"]) == pytest.approx(1)
    status, out, err = here("predict", str(run), str(photos / "*.tif"))
    assert (status, out) == (1, "")
    assert "matches no file" in err
    (photos / "empty").mkdir()
    status, _, err = here("predict", str(run), str(photos / "empty"))
    assert status == 1
    assert "there is no image in this folder" in err


def test_images_are_named_once_and_in_order(photos: Path) -> None:
    names = [str(photos / "2.png"), str(photos), str(photos / "?.png")]
    found = [path.relative_to(photos).as_posix() for path in images_of(names)]
    assert found == ["2.png", "0.png", "1.png", "broken.png", "deeper/0.jpg", "deeper/1.jpg"]


# --- evaluate ------------------------------------------------------------------------------------


def test_the_control_arm_is_measured_too(run: Path, here: Here) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for arm, name in (("se", "confusion"), ("control", "confusion-control")):
        status, out, err = here("evaluate", str(run), "--arm", arm, "--json")
        assert status == 0, err
        found = json.loads(out)
        assert found["arm"] == arm
        assert found["top1"] == pytest.approx(summary["arms"][arm]["mean"])
        assert (run / f"{name}.csv").exists()
    trained = use.load_run(run, arm="control")
    assert not any(".se." in key for key in trained.network.state_dict())


def test_of_several_seeds_the_best_control_is_measured(run: Path) -> None:
    worse = run / "control-1"
    worse.mkdir()
    arm = json.loads((run / "control-0" / "arm.json").read_text())
    (worse / "arm.json").write_text(json.dumps(arm | {"val_acc": arm["val_acc"] - 0.1, "seed": 1}))
    (worse / "best.safetensors").write_bytes(b"not the one")
    use.load_run(run, arm="control")
    (worse / "arm.json").write_text(json.dumps(arm | {"val_acc": arm["val_acc"] + 0.1, "seed": 1}))
    with pytest.raises(CheckpointError, match=r"control-1/best\.safetensors is damaged"):
        use.load_run(run, arm="control")


def test_without_a_control_arm_there_is_none_to_measure(run: Path) -> None:
    for path in run.glob("control-*/arm.json"):
        path.unlink()
    with pytest.raises(ArgumentError, match="has no control arm"):
        use.load_run(run, arm="control")


def test_other_data_never_write_over_the_figures_of_the_run(
    run: Path, tmp_path: Path, here: Here
) -> None:
    assert here("evaluate", str(run))[0] == 0
    before = {path: path.read_bytes() for path in run.glob("confusion*")}
    other = tree(tmp_path / "others", "a", "b", count=3)
    status, out, err = here("evaluate", str(run), "--data", str(other))
    assert status == 0, err
    assert "6 images" in out
    assert {path: path.read_bytes() for path in before} == before
    assert (run / "confusion-of-others.csv").exists()
    assert (run / "confusion-of-others.png").exists()


def test_the_mean_over_an_image_and_its_mirror_image(run: Path) -> None:
    trained = use.load_run(run)
    both = replace(trained, mirrored=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        one, other = (trained.scores(x).softmax(1) for x in (images, images.flip(-1)))
        torch.testing.assert_close(both.scores(images).softmax(1), (one + other) / 2)
        torch.testing.assert_close(both.scores(images), both.scores(images.flip(-1)))


def test_tta_is_an_option(run: Path, here: Here) -> None:
    assert here("evaluate", str(run), "--tta", "--json")[0] == 0


# --- export, and checkpoints of timm -------------------------------------------------------------


def test_a_run_is_exported(run: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "net.pt2"
    status, said, err = here("export", str(run), "--format", "torch-export", "--output", str(out))
    assert status == 0, err
    assert "same outputs as the model" in said
    trained = use.load_run(run)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = trained.network.cpu()(x)
        torch.testing.assert_close(torch.export.load(out).module()(x), expected, atol=1e-4, rtol=0)
    assert here("export", "test_resnet", "--output", str(out))[0] == 2
    assert here("export", str(run), "--num-classes", "3", "--output", str(out))[0] == 2


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoints_of_timm_train_are_read_without_running_code(
    averaged: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    trained = timm.create_model("test_resnet")
    other = timm.create_model("test_resnet").state_dict()
    state = {f"module.{key}": value for key, value in trained.state_dict().items()}
    checkpoint: dict[str, Any] = {
        "epoch": 3,
        "arch": "test_resnet",
        "state_dict": other if averaged else state,
        "optimizer": {},
        "version": 2,
        "args": argparse.Namespace(model="test_resnet", lr=0.1),
    }
    if averaged:
        checkpoint["state_dict_ema"] = state
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    network = timm.create_model("test_resnet")
    load_weights(network, tmp_path / "last.pth.tar")
    wanted = trained.state_dict()
    assert [key for key, v in network.state_dict().items() if not torch.equal(v, wanted[key])] == []


class Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


def test_nothing_else_is_allowed_in_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(x=Payload())
    torch.save({"state_dict": {}, "args": args}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="without running code"):
        load_weights(timm.create_model("test_resnet"), tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


# --- progress ------------------------------------------------------------------------------------


class _Trainer:
    is_global_zero = True
    num_training_batches, num_val_batches = 3, [2]

    def __init__(self, epoch: int, epochs: int) -> None:
        self.current_epoch, self.max_epochs = epoch, epochs
        figures = {"train_loss_epoch": 1.2345, "val_loss": 0.5, "val_acc": 1.0}
        self.callback_metrics = {**figures, "images_per_s": 1234.4}


def test_a_line_an_epoch_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from se_inject.finetune.training import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    text = io.StringIO()
    lines: Any = EpochLines(Console(file=text, width=80), arms_after=2)
    lines.on_train_start(None, None)
    for epoch in (98, 99):
        now[0] += 10.0
        lines.on_train_epoch_end(_Trainer(epoch, 100), None)
    one, two = text.getvalue().splitlines()
    # One epoch of this arm and two arms of a hundred epochs are left, of ten seconds each.
    assert one == (
        "epoch 99/100: loss 1.234; val loss 0.500, acc 100.00 %; 1234 img/s; 34 min left"
    )
    assert two.startswith("epoch 100/100: ")
    assert two.endswith("; 33 min left")
    assert max(map(len, (one, two))) <= 80


def test_the_bar_counts_epochs_from_1() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True)
    bar: Any = EpochBar(console)
    trainer = _Trainer(0, 5)
    bar.on_train_start(trainer, None)
    bar.on_train_epoch_start(trainer, None)
    for _ in range(3):
        bar.on_train_batch_end()
    bar.progress.refresh()
    bar.on_validation_epoch_start(trainer, None)
    bar.on_validation_batch_end()
    bar.progress.refresh()
    bar.teardown(trainer, None, "fit")
    assert "epoch 1/5 training" in text.getvalue()
    assert "3/3" in text.getvalue()
    assert "epoch 1/5 validation" in text.getvalue()
    assert "1/2" in text.getvalue()


# --- pictures ------------------------------------------------------------------------------------

ROWS = [
    {"arm": arm, "seed": 0, "epoch": e, "train_loss": 1 / e, "val_loss": 1.1 / e}
    | {"train_acc": 0.1 * e, "val_acc": 0.09 * e}
    for arm in ("se", "control")
    for e in range(1, 5)
]


def test_curves_have_what_a_reader_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    original = pictures.atomic_write

    def seen(path: Path) -> Any:
        from matplotlib import pyplot

        drawn.append(pyplot.gcf())
        return original(path)

    monkeypatch.setattr(pictures, "atomic_write", seen)
    best = {("se", 0): 3, ("control", 0): 4}
    curves(ROWS, tmp_path / "curves.png", frozen_epochs=2, best=best)
    [figure] = drawn
    for axis in figure.axes:
        figures = [line for line in axis.lines if len(line.get_xdata()) == 4]
        assert len(figures) == 4  # training and validation of both arms
        assert {line.get_color() for line in figures} == {"tab:blue", "tab:orange"}
        stars = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "*"]
        assert stars == [[3], [4]]
        assert any(list(line.get_xdata()) == [2.5, 2.5] for line in axis.lines)
        assert all(float(tick).is_integer() for tick in axis.get_xticks())
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 480)


@pytest.mark.parametrize("count", [2, 20, 100])
def test_a_confusion_matrix_is_readable(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    original = pictures.atomic_write

    def seen(path: Path) -> Any:
        from matplotlib import pyplot

        [axis, _] = pyplot.gcf().axes
        texts.extend(text.get_text() for text in axis.texts)
        texts.extend(label.get_text() for label in axis.get_yticklabels())
        return original(path)

    monkeypatch.setattr(pictures, "atomic_write", seen)
    matrix = torch.eye(count, dtype=torch.long) * 3
    matrix[0, 1] = 1
    names = [f"c$${i}" if i % 2 else f"猫{i}\x1b" for i in range(count)]
    confusion_picture(matrix, names, tmp_path / "confusion.png")
    assert [name for name in map(printable, names) if name not in texts] == []
    assert ("75 %\n3" in texts) == ("25 %\n1" in texts) == (count <= 20)
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.size[0] / count > 20  # pixels a row


def test_a_class_with_dollars_is_evaluated(run: Path, tmp_path: Path, here: Here) -> None:
    """matplotlib would take it for a formula, and fail."""
    renamed = {'"a"': '"c$$"', "a/": "c$$/", ",a,": ",c$$,"}
    for name in ("classes.json", "summary.json", "split.csv"):
        text = (run / name).read_text()
        for old, new in renamed.items():
            text = text.replace(old, new)
        (run / name).write_text(text)
    data = tree(tmp_path / "data", "c$$", "b")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": str(data)}))
    status, out, err = here("evaluate", str(run))
    assert status == 0, err
    assert "c$$" in out


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["finetune", "evaluate", "predict", "export"])
def test_help_breaks_no_word_at_80_columns(command: str, here: Here) -> None:
    status, out, _ = here(command, "--help")
    assert status == 0
    said, hints = re.sub(r"[^\w|.,:;()\-+/']+", " ", out), get_type_hints(Settings)
    group: Any = typer.main.get_command(cli.app)
    for parameter in group.commands[command].params:
        if getattr(parameter, "hidden", False) or parameter.help is None:
            continue
        values = get_args(hints.get(parameter.name)) if command == "finetune" else ()
        values = [value for value in values if isinstance(value, str)]
        for word in (*parameter.help.split(), *str(parameter.metavar or "").split(), *values):
            plain = re.sub(r"[^\w|.,:;()\-+/']+", " ", word).strip()
            assert plain in said, (parameter.name, word)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["finetune", "evaluate", "predict"])
def test_every_option_is_a_sentence_with_its_default(command: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    for parameter in group.commands[command].params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        assert parameter.help
        assert parameter.help[0].isupper() or parameter.help.startswith("auto"), parameter.name
        assert parameter.help.endswith((".", ")")), parameter.name


def test_the_options_of_finetune_are_in_panels(here: Here) -> None:
    _, out, _ = here("finetune", "--help")
    titles = re.findall(r"╭─ ([\w ]+?) ─", out)
    panels = ["Data", "Network", "Recipe", "Machine", "Output"]
    assert [title for title in titles if title in panels] == panels
    assert np.unique(titles).size == len(titles)
    assert SETTINGS.epochs == 1


def test_no_line_of_a_run_is_wider_than_a_terminal(tmp_path: Path, here: Here) -> None:
    data = tree(tmp_path / "data", "a", "b")
    status, out, err = here(
        *("finetune", "test_resnet", "--no-pretrained", "--img-size", "32", "--workers", "0"),
        *("--batch-size", "8", "--epochs", "2", "--freeze-epochs", "1", "--data", str(data)),
        *("--output", str(tmp_path / "r")),
    )
    assert status == 0, err
    said = err.splitlines()
    assert "  epoch 1 trains the SE blocks and the head: 9,562 parameters (2.50 %)" in said
    assert "  epoch 2 trains everything: 382,250 parameters (100.00 %)" in said
    assert "  the network has 382,250 parameters, 9,368 of them in SE blocks" in said
    lines = [line for line in (out + err).splitlines() if str(tmp_path) not in line]
    assert max(map(len, (line for line in lines if not line.startswith("warning")))) <= 80
