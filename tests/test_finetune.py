"""se-inject finetune: what is frozen when, the same batches for both arms, stop and go on."""

import csv
import functools
import io
import json
import re
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from commands import command
from helpers import randomize
from PIL import Image
from processes import started
from rich.console import Console
from torch import Tensor, nn

from se_inject import ArgumentError, DataError, TrainingError, UnknownModelError, inject_se, save_se
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.data.divide import split
from se_inject.finetune.data.images import to_rgb
from se_inject.finetune.data.loading import NO_IMAGE, Images, loader, open_data
from se_inject.finetune.figures import results
from se_inject.finetune.options import config
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.runs import trainer as running
from se_inject.finetune.training import network
from se_inject.finetune.training.optimizer import groups_of
from se_inject.finetune.training.recipe import Recipe

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]

SETTINGS = Settings(
    "test_resnet", pretrained=False, epochs=2, freeze_epochs=1, img_size=32, workers=0, lr=3e-3
)
BEFORE_ROOMS = Path(__file__).parent / "data" / "before_rooms"
QUIET = Console(quiet=True)
CONFIG = timm.data.resolve_data_config({"input_size": (3, 32, 32)})


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 of the digits: what is asked here does not depend on how many there are."""
    from se_inject.finetune.data import sources

    original = sources.Digits.__init__

    def few(self: Any) -> None:
        original(self)
        self.labels = self.labels[:200]

    monkeypatch.setattr(sources.Digits, "__init__", few)


# --- phases --------------------------------------------------------------------------------------


class Snapshots(pl.Callback):
    """All tensors of the base after each epoch."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.taken.append({k: v.clone() for k, v in pl_module.network.state_dict().items()})


def base() -> nn.Module:
    """Not as built: timm's last norms are zero at first, and nothing behind them learns."""
    pl.seed_everything(0, verbose=False)
    return randomize(timm.create_model("test_resnet", num_classes=10, drop_path_rate=0.2))


def fit(settings: Settings, callback: pl.Callback) -> Recipe:
    network = inject_se(base(), example_input=torch.empty(2, 3, 32, 32))
    recipe = Recipe(network, settings, 10, 0)
    data = open_data(settings, CONFIG, 0)
    trainer = pl.Trainer(
        max_epochs=settings.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loaders = [
        loader(images, settings, training=training, epoch=0, rank=0, world=1)
        for images, training in ((data.train, True), (data.val, False))
    ]
    trainer.fit(recipe, *loaders)
    return recipe


def is_new(key: str) -> bool:
    return ".se." in key or key.startswith("fc.")


def test_phase_1_freezes_the_base_to_the_bit_and_phase_2_moves_it() -> None:
    start = base().state_dict()
    callback = Snapshots()
    fit(SETTINGS, callback)
    after_1, after_2 = callback.taken
    old = [key for key in start if not is_new(key)]
    assert any("running_mean" in key for key in old)
    assert [key for key in old if not torch.equal(start[key], after_1[key])] == []
    learnt = [key for key in after_1 if is_new(key) and not torch.equal(after_1[key], after_2[key])]
    assert learnt == [key for key in after_1 if is_new(key)]
    still = [key for key in old if torch.equal(after_1[key], after_2[key])]
    assert still == []


@pytest.mark.parametrize(("bn_stats", "move"), [("frozen", False), ("moving", True)])
def test_statistics_in_phase_2(bn_stats: Any, move: bool) -> None:
    callback = Snapshots()
    fit(replace(SETTINGS, bn_stats=bn_stats), callback)
    after_1, after_2 = callback.taken
    statistics = [key for key in after_1 if "running_" in key]
    moved = {key for key in after_1 if not torch.equal(after_1[key], after_2[key])}
    assert statistics
    assert [key in moved for key in statistics] == [move] * len(statistics)
    assert {"bn1.weight", "conv1.0.weight"} <= moved


def test_a_pretrained_base_keeps_its_statistics() -> None:
    assert not SETTINGS.statistics_frozen
    assert replace(SETTINGS, pretrained=True).statistics_frozen
    assert replace(SETTINGS, checkpoint="base.pth").statistics_frozen
    assert not replace(SETTINGS, pretrained=True, bn_stats="moving").statistics_frozen
    assert not replace(SETTINGS, pretrained=True, model="mine:network").statistics_frozen


@pytest.mark.parametrize(("train", "head_moves"), [("se", False), ("se+head", True)])
def test_what_is_not_trained_never_moves(train: Any, head_moves: bool) -> None:
    callback = Snapshots()
    fit(replace(SETTINGS, train=train), callback)
    first, last = callback.taken
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert {key for key in moved if not is_new(key)} == set()
    assert ("fc.weight" in moved) == head_moves
    assert any(".se." in key for key in moved)


def test_freezing_survives_train() -> None:
    network = inject_se(timm.create_model("test_resnet"), example_input=torch.empty(2, 3, 32, 32))
    recipe = Recipe(network, replace(SETTINGS, train="se+head"), 1000, 0)
    recipe.eval().train()
    modes = {name: module.training for name, module in network.named_modules()}
    assert not modes["bn1"]
    assert not modes["layer1.0"]
    assert modes["layer1.0.se"]
    assert modes["layer1.0.se.fc1"]
    assert modes["fc"]


def test_rates_and_decay_by_group() -> None:
    network = inject_se(timm.create_model("test_resnet"), example_input=torch.empty(2, 3, 32, 32))
    groups = list(groups_of(network, Recipe(network, SETTINGS, 1000, 0).new, SETTINGS))
    names = {id(p): name for name, p in network.named_parameters()}
    seen = {}
    for group in groups:
        for p in group["params"]:
            seen[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert len(seen) == len(names)
    assert seen["conv1.0.weight"] == (
        pytest.approx(3e-4),
        0.05,
    )
    assert seen["bn1.weight"] == (pytest.approx(3e-4), 0.0)
    assert seen["layer1.0.se.fc1.weight"] == (3e-3, 0.05)
    assert seen["layer1.0.se.fc1.bias"] == (3e-3, 0.0)
    assert seen["fc.bias"] == (3e-3, 0.0)


# --- runs ----------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)
        ]


def test_the_arms_differ_in_nothing_but_se(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[bool, int], list[Any]] = {}
    heads = {}
    step = Recipe.training_step

    def watched(self: Recipe, batch: Any, index: int) -> Tensor:
        key = (any(".se." in k for k in self.network.state_dict()), self.seed)
        heads.setdefault(key, self.network.fc.weight.detach().clone())
        seen.setdefault(key, []).append((batch[0].sum().item(), batch[1].tolist()))
        return step(self, batch, index)

    monkeypatch.setattr(Recipe, "training_step", watched)
    settings = replace(SETTINGS, control=True, seeds=2, aa="rand-m9-mstd0.5")
    summary = running.start(settings, tmp_path / "run", QUIET)
    for seed in (0, 1):
        assert seen[True, seed] == seen[False, seed]
        assert torch.equal(heads[True, seed], heads[False, seed])
    assert seen[True, 0] != seen[True, 1]
    assert set(summary["arms"]) == {"se", "control"}
    assert summary["arms"]["se"]["params"] - summary["arms"]["control"]["params"] == 9368
    assert "2 seeds)" in summary["verdict"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.csv", "curves.png", "best.safetensors", "summary.json"} <= names
    assert len(rows_of(tmp_path / "run")) == 8
    assert Image.open(tmp_path / "run" / "curves.png").size[0] > 500


def test_a_verdict_says_what_the_seeds_say() -> None:
    def arm(*accuracies: float) -> list[dict[str, Any]]:
        return [{"val_acc": a} for a in accuracies]

    def verdict(**arms: list[dict[str, Any]]) -> str:
        return results.verdict(arms)

    clear = verdict(se=arm(0.90, 0.91, 0.93), control=arm(0.80, 0.82, 0.82))
    assert clear == (
        "SE blocks change the accuracy by +10.00 points (95 % interval ±2.48, 3 seeds)."
        " This is more than the noise."
    )
    assert "within the noise" in verdict(se=arm(0.9, 0.8, 0.85), control=arm(0.8, 0.9, 0.85))
    assert "One seed says nothing" in verdict(se=arm(0.9), control=arm(0.8))
    assert "--control" in verdict(se=arm(0.9))


PROGRAM = """
import signal
import sys
from pathlib import Path
from se_inject.finetune.data import sources
from se_inject.finetune.training.optimizer import groups_of
from se_inject.finetune.training.recipe import Recipe
from rich.console import Console
from se_inject.finetune.runs.trainer import start
from se_inject.finetune.options.settings import Settings

folder = Path(sys.argv[1])
all_digits, step = sources.Digits.__init__, Recipe.training_step

def few_digits(self):
    all_digits(self)
    self.labels = self.labels[:200]

def wait_in_epoch_2(self, batch, index):
    if self.current_epoch == 1 and index == 1:
        (folder / "in_epoch_2").touch()
        while True:
            signal.pause()
    return step(self, batch, index)

sources.Digits.__init__ = few_digits
Recipe.training_step = wait_in_epoch_2
start(
    Settings("test_resnet", pretrained=False, epochs=3, freeze_epochs=1, img_size=32,
             batch_size=32, workers=2, # they resume in another way than workers=0
             lr=3e-3, aa="rand-m9-mstd0.5", val_split=0.5),
    folder, Console(quiet=True),
)
"""
THE_SAME = replace(
    SETTINGS, epochs=3, batch_size=32, workers=2, aa="rand-m9-mstd0.5", val_split=0.5
)


def killed_in_epoch_2(folder: Path) -> None:
    """A run that waits in its second epoch until it is killed, however slow the machine is."""
    process = started(PROGRAM, str(folder))
    while not (folder / "in_epoch_2").exists() and process.exitcode is None:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def terminated_in_epoch_2(folder: Path) -> None:
    step = Recipe.training_step

    def end(self: Recipe, batch: Any, index: int) -> Tensor:
        if self.current_epoch == 1 and index == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, index)

    message = f"stopped. Go on with: se-inject finetune --resume {folder}"
    with (
        mock.patch.object(Recipe, "training_step", end),
        pytest.raises(TrainingError, match=re.escape(message)),
    ):
        running.start(THE_SAME, folder, QUIET)


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def test_kill_minus_nine_and_sigterm_go_on_to_the_same_weights(tmp_path: Path) -> None:
    """Only what is killed needs a process of its own."""
    running.start(THE_SAME, tmp_path / "whole", QUIET)
    expected, metrics = weights(tmp_path / "whole"), rows_of(tmp_path / "whole")
    for stop in (killed_in_epoch_2, terminated_in_epoch_2):
        folder = tmp_path / stop.__name__
        stop(folder)
        assert len(rows_of(folder)) == 1
        running.resume(folder, QUIET)
        again = weights(folder)
        assert [key for key in expected if not torch.equal(expected[key], again[key])] == []
        assert rows_of(folder) == metrics


def test_a_run_folder_of_before_the_rooms_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after epoch 1 of 3, by the version in which one file did it all."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # for small_net
    folder = tmp_path / "run"
    shutil.copytree(BEFORE_ROOMS / "stopped", folder)
    before = rows_of(folder)
    running.resume(folder, QUIET, trust_code=True)
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [{key: row[key] for key in before[0]} for row in rows[:1]] == before
    assert use.load_run(folder, trust_code=True).classes == tuple("0123456789")


def test_settings_are_in_the_file_as_before(tmp_path: Path) -> None:
    shutil.copy(BEFORE_ROOMS / "stopped" / "config.json", tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    settings = config.read_config(tmp_path)
    assert settings.include is None
    config.write_config(settings, tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old["freeze_epochs"] = old.pop("warmup_epochs")
    assert new | old == new
    assert list(new)[:2] == ["model", "data"]
    config.write_config(replace(settings, include="a.*", exclude=("b", "c")), tmp_path)
    again = config.read_config(tmp_path)
    assert (again.include, again.exclude) == (("a.*",), ("b", "c"))


def test_the_best_network_evaluates_as_in_training_and_predicts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = running.start(
        replace(SETTINGS, epochs=6, freeze_epochs=0, base_lr_scale=1.0, batch_size=16),
        folder,
        QUIET,
    )
    trained = use.load_run(folder)
    result = use.evaluate(trained, folder)
    assert result["top1"] == pytest.approx(summary["arms"]["se"]["mean"], abs=1e-6)
    assert result["top1"] > 0.5  # chance is 0.1
    assert Image.open(folder / "confusion.png").size[0] > 300
    with (folder / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert sum(int(n) for row in rows[1:] for n in row[1:]) == result["images"]
    picture = np.full((9, 7), 200, dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "grey.png")
    likely = use.predict(trained, tmp_path / "grey.png", count=10)
    assert sum(p for _, p in likely) == pytest.approx(1)
    assert likely == sorted(likely, key=lambda pair: -pair[1])
    with pytest.raises(DataError, match="no image that can be read"):
        use.predict(trained, folder / "config.json")


def test_a_pretrained_base_stays_out_of_the_file(tmp_path: Path) -> None:
    base = timm.create_model("test_resnet")
    torch.save(base.state_dict(), tmp_path / "base.pth")
    settings = replace(SETTINGS, checkpoint=str(tmp_path / "base.pth"), train="se+head")
    running.start(settings, tmp_path / "run", QUIET)
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "run" / "best.safetensors")
    assert "conv1.0.weight" not in keys
    assert use.load_run(tmp_path / "run").network.num_classes == 10


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.2, "cutmix": 1.0, "ema": 0.9},
        # Dynamo reads each forward again in each phase, so the network has two blocks.
        {"compile": True, "model": "small_net:build", "r": 4},
    ],
)
def test_options_that_change_the_step(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor takes minutes and is not in question here.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = replace(SETTINGS, batch_size=32, **options)
    summary = running.start(settings, tmp_path / "run", QUIET)
    trained = use.load_run(tmp_path / "run", trust_code="model" in options)
    best = use.evaluate(trained, tmp_path / "run")["top1"]
    assert best == pytest.approx(summary["arms"]["se"]["mean"], abs=1e-6)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at epoch \d, step \d+"):
        running.start(replace(SETTINGS, lr=1e30, clip=0.0, epochs=3), tmp_path / "run", QUIET)


# --- data ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of four images, in all modes that people's files have."""
    root = tmp_path / "flowers"
    for i, name in enumerate(("daisy", "rose")):
        (root / name).mkdir(parents=True)
        noise = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        image.save(root / name / "rgb.jpg")
        image.convert("L").save(root / name / "grey.png")
        image.convert("CMYK").save(root / name / "cmyk.jpg")
        image.convert("RGBA").save(root / name / "rgba.png")
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(root / name / "deep.png")
    return root


def test_all_modes_of_images_are_read(folder: Path) -> None:
    data = open_data(replace(SETTINGS, data=str(folder)), CONFIG, 0)
    assert data.classes == ("daisy", "rose")
    assert (len(data.train), len(data.val)) == (8, 2)
    for images in (data.train, data.val):
        for i in range(len(images)):
            x, _, wrong = images[i]
            assert not wrong
            assert x.shape == (3, 32, 32)
            assert x.std() > 0


def test_sixteen_bits_become_eight() -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    deep, flat = (to_rgb(Image.fromarray(a)) for a in (ramp * 257, ramp.astype(np.uint8)))
    assert np.array_equal(np.asarray(deep), np.asarray(flat))


def test_bad_images_are_named_counted_and_skipped(folder: Path) -> None:
    whole = (folder / "daisy" / "rgb.jpg").read_bytes()
    (folder / "daisy" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "rose" / "text.jpg").write_text("not an image")
    settings = replace(SETTINGS, data=str(folder), batch_size=12, val_split=0.01)
    data = open_data(settings, CONFIG, 0)
    labels = bad = 0
    names: list[str] = []
    for images in (data.train, data.val):
        for x, y, unreadable in loader(images, settings, training=False, epoch=0, rank=0, world=1):
            assert len(x) == len(y)
            labels += int((y != NO_IMAGE).sum())
            bad += len(unreadable)
            names += unreadable
    assert (labels, bad) == (10, 2)
    assert any("half.jpg" in name for name in names)
    assert any("text.jpg" in name for name in names)


def bad_folder(root: Path, kind: str) -> str:
    (root / "a").mkdir(parents=True)
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    if kind != "empty":
        image.save(root / "a" / "1.png")
        image.save(root / "a" / "2.png")
    if kind in ("val lacks", "val has more"):
        for part, names in (
            ("train", ["a", "b"]),
            ("val", ["a"] if kind == "val lacks" else ["a", "b", "c"]),
        ):
            for name in names:
                (root / part / name).mkdir(parents=True)
                image.save(root / part / name / "1.png")
    return str(root)


BAD_DATA = {
    "empty": "no images",
    "one class": r"there is only one class \(a\)",
    "val lacks": "lacks classes of the training set: b",
    "val has more": "classes that are not in the training set: c",
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_folders_are_one_clear_error(kind: str, tmp_path: Path) -> None:
    data = bad_folder(tmp_path / "data", kind)
    with pytest.raises(DataError, match=BAD_DATA[kind]):
        open_data(replace(SETTINGS, data=data), CONFIG, 0)


def test_an_image_beside_the_class_folders_is_an_error(folder: Path) -> None:
    (folder / "rose" / "rgb.jpg").rename(folder / "stray.jpg")
    with pytest.raises(DataError, match=r"stray\.jpg lies beside the class folders"):
        open_data(replace(SETTINGS, data=str(folder)), CONFIG, 0)


def test_class_order_does_not_hang_on_a_hash(tmp_path: Path) -> None:
    """timm sorts a set by a key for which these names are equal."""
    for name in ("a1", "a01", "a001"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    data = open_data(replace(SETTINGS, data=str(tmp_path)), CONFIG, 0)
    assert data.classes == ("a001", "a01", "a1")
    source = data.train.source
    for name, label in zip(source.names, source.labels, strict=True):
        assert data.classes[label] == Path(name).parent.name


def shard(path: Path, images: list[tuple[str, Path, str]]) -> None:
    """A WebDataset shard of (key, image file, label)."""
    with tarfile.open(path, "w") as tar:
        for key, image, label in images:
            for name, content in (
                (f"{key}{image.suffix}", image.read_bytes()),
                (f"{key}.cls", label.encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_shards_give_the_images_of_the_folder(
    words: bool, split: bool, folder: Path, tmp_path: Path
) -> None:
    """A folder and the same images in tar files: equal tensors and labels, by index."""
    shards = tmp_path / "shards"
    shards.mkdir()
    flat = open_data(replace(SETTINGS, data=str(folder)), CONFIG, 0).train.source
    items = [
        (f"set/{i:03}.x", folder / name, flat.classes[label] if words else str(label))
        for i, (name, label) in enumerate(zip(flat.names, flat.labels, strict=True))
    ]
    # The key ends at the first dot of the file name, not of the path.
    items = [(key.removesuffix(".x"), image, label) for key, image, label in items]
    if split:
        shard(shards / "flowers-train-0000.tar", items[:3] + items[5:8])
        shard(shards / "flowers-val-0000.tar", items[3:5] + items[8:])
    else:
        shard(shards / "0000.tar", items[:4])
        shard(shards / "0001.tar", items[4:])
    data = open_data(replace(SETTINGS, data="wds/flowers", data_dir=str(shards)), CONFIG, 0)
    assert data.classes == (flat.classes if words else ("0", "1"))
    assert len(data.train) + len(data.val) == 10
    if not split:
        for i in range(10):
            ours, theirs = data.train.source[i], flat[i]
            assert ours[1] == theirs[1]
            assert np.array_equal(np.asarray(ours[0]), np.asarray(theirs[0]))
    else:
        assert (len(data.train), len(data.val)) == (6, 4)


def test_a_folder_without_shards() -> None:
    with pytest.raises(DataError, match=r"has no \*.tar. Give wds/FOLDER"):
        open_data(replace(SETTINGS, data="wds/nothing"), CONFIG, 0)


def test_hugging_face_data_are_read_without_decoding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("daisy", "rose"):
        (tmp_path / "hub" / "train" / name).mkdir(parents=True)
        for image in (folder / name).iterdir():
            image.rename(tmp_path / "hub" / "train" / name / image.name)
    bad = tmp_path / "hub" / "train" / "rose" / "bad.png"
    bad.write_bytes(b"no image")
    settings = replace(SETTINGS, data=f"hfds/{tmp_path / 'hub'}", data_dir=str(tmp_path / "cache"))
    data = open_data(settings, CONFIG, 0)
    assert data.classes == ("daisy", "rose")
    assert sorted(data.train.source.labels) == [0] * 5 + [1] * 6
    labels = [data.train[i][1] for i in range(len(data.train))]
    labels += [data.val[i][1] for i in range(len(data.val))]
    assert sorted(labels) == [NO_IMAGE] + [0] * 5 + [1] * 5


def test_unknown_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_data(replace(SETTINGS, data="nowhere"), CONFIG, 0)
    with pytest.raises(DataError, match="cannot be loaded"):
        open_data(replace(SETTINGS, data="torch/nothing", data_dir=str(tmp_path)), CONFIG, 0)


def test_splits_are_stratified_and_whole() -> None:
    labels = [0] * 10 + [1] * 20 + [2]
    train, val = split(labels, 0.2)
    assert sorted(train + val) == list(range(31))
    assert [sum(labels[i] == c for i in val) for c in range(3)] == [2, 4, 0]
    assert split(labels, 0.2) == (train, val)


def test_augmentation_follows_from_seed_epoch_and_index() -> None:
    settings = replace(SETTINGS, aa="rand-m9-mstd0.5")

    def images(seed: int, epoch: int) -> Images:
        train = open_data(settings, CONFIG, seed).train
        train.epoch = epoch
        return train

    x = images(0, 0)[3][0]
    torch.rand(3)
    assert torch.equal(images(0, 0)[3][0], x)
    assert not torch.equal(images(0, 1)[3][0], x)
    assert not torch.equal(images(1, 0)[3][0], x)


def test_two_processes_see_the_batches_of_one() -> None:
    settings = replace(SETTINGS, batch_size=16)
    data = open_data(settings, CONFIG, 0)

    def labels(rank: int, world: int) -> list[list[int]]:
        batches = loader(data.train, settings, training=True, epoch=3, rank=rank, world=world)
        return [y.tolist() for _, y, _ in batches]

    for one, a, b in zip(labels(0, 1), labels(0, 2), labels(1, 2), strict=True):
        assert sorted(one) == sorted(a + b)


def test_each_image_is_validated_once_by_some_process() -> None:
    """torch's own sampler would give some images twice, so that all have as many."""
    settings = replace(SETTINGS, batch_size=7)
    data = open_data(settings, CONFIG, 0)
    seen: list[int] = []
    for rank in range(7):
        batches = list(loader(data.val, settings, training=False, epoch=0, rank=rank, world=7))
        assert len(batches) == -(-len(data.val) // 7)
        seen += [label for _, y, _ in batches for label in y.tolist() if label != NO_IMAGE]
    assert sorted(seen) == sorted(data.val[i][1] for i in range(len(data.val)))
    assert len(data.val) % 7


# --- the commands --------------------------------------------------------------------------------


def test_wrong_settings_and_folders_are_clear_errors(tmp_path: Path) -> None:
    for change, message in (
        ({"freeze_epochs": 3}, "--freeze-epochs 3 must be between 0 and --epochs 2"),
        ({"val_split": 1.5}, "--val-split 1.5 must be a share"),
        ({"lr": 0.0}, "--lr 0.0 must be above 0"),
        ({"control": True, "train": "se"}, "nothing to train"),
    ):
        with pytest.raises(ArgumentError, match=message):
            running.start(replace(SETTINGS, **change), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot be written"):
        running.start(SETTINGS, tmp_path / "file", QUIET)
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(ArgumentError, match=r"holds a run already\. --resume"):
        running.start(SETTINGS, tmp_path, QUIET)
    with pytest.raises(ArgumentError, match="is not a run folder"):
        running.resume(tmp_path / "nothing", QUIET)


def test_a_full_disk_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.shutil, "disk_usage", lambda _: Free())
    with pytest.raises(ArgumentError, match="1 MB are free, but the run needs about 12 MB"):
        running.start(SETTINGS, tmp_path / "run", QUIET)


class Free:
    free = 1_000_000


def test_weights_that_cannot_be_fetched_name_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="--checkpoint FILE, or begin with --no-pretrained"):
        network.base_of(replace(SETTINGS, pretrained=True))


def test_the_command_trains_and_says_so(tmp_path: Path) -> None:
    result = command(
        *("finetune", "test_resnet", "--no-pretrained", "--epochs", "1", "--warmup-epochs", "0"),
        *("--data", "digits"),
        *("--img-size", "32", "--workers", "0", "--output", str(tmp_path / "run")),
    )
    assert result.returncode == 0, result.stderr
    assert "160 images to train, 40 to validate, 10 classes" in result.stderr
    assert "epoch 1/1: loss" in result.stderr
    assert "383,026" in result.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["classes"][3] == "3"
    assert command("finetune", "--resume", str(tmp_path / "run")).returncode == 0  # nothing is left
    other = command("finetune", "--resume", str(tmp_path / "run"), "--lr", "1")
    assert other.returncode == 2
    assert "not --lr" in " ".join(other.stderr.replace("│", "").split())
    assert command("finetune").returncode == 2


# --- a run can be used afterwards, however it began ----------------------------------------------


def own_network() -> nn.Module:
    """A callable's network is random, whatever --pretrained says."""
    return timm.create_model("test_resnet", num_classes=10)


def se_file(folder: Path) -> Path:
    model = inject_se(timm.create_model("test_resnet", num_classes=10))
    save_se(model, folder / "se.safetensors", extra="*")
    return folder / "se.safetensors"


BEGINNINGS: dict[str, Any] = {
    "an SE checkpoint": lambda folder: {"checkpoint": str(se_file(folder))},
    "a variant": lambda folder: {
        "placement": "identity",
        "squeeze": "max",
        "gate": "tanh",
        "bias": False,
        "r": {"layer1.*": 4, "*": 8},
    },
    "other attention": lambda folder: {"attention": "eca", "train": "se+head"},
    "an average over a frozen base": lambda folder: {"train": "se+head", "ema": 0.9},
    "a callable": lambda folder: {
        "model": "test_finetune:own_network",
        "pretrained": True,
        "train": "se+head",
    },
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_what_was_measured_in_training_can_be_measured_again(kind: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, **BEGINNINGS[kind](tmp_path))
    summary = running.start(settings, tmp_path / "run", QUIET)
    trained = use.load_run(tmp_path / "run", trust_code=kind == "a callable")
    result = use.evaluate(trained, tmp_path / "run")
    assert result["top1"] == pytest.approx(summary["arms"]["se"]["mean"], abs=1e-6)


def test_a_new_head_cannot_stay_untrained(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"--train se keeps the head .* Use --train se\+head"):
        running.start(replace(SETTINGS, train="se"), tmp_path / "run", QUIET)
    # What failed before its first epoch does not stand in the way of the right command.
    running.start(replace(SETTINGS, train="se+head", epochs=1), tmp_path / "run", QUIET)


def test_a_whole_folder_is_evaluated(folder: Path, tmp_path: Path) -> None:
    running.start(replace(SETTINGS, data=str(folder)), tmp_path / "run", QUIET)
    trained = use.load_run(tmp_path / "run")
    assert use.evaluate(trained, tmp_path / "run")["images"] == 2
    assert use.evaluate(trained, tmp_path / "run", data=str(folder))["images"] == 10


def test_strategies_and_processes_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArgumentError, match="fsdp works with neither --ema nor --compile"):
        running.start(replace(SETTINGS, strategy="fsdp", ema=0.9), tmp_path / "run", QUIET)
    with pytest.raises(ArgumentError, match="--batch-size 64 is shared by all 3 processes"):
        running.start(replace(SETTINGS, devices="3"), tmp_path / "run", QUIET)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="2 processes were started, but --devices auto"):
        running.start(SETTINGS, tmp_path / "run", QUIET)
