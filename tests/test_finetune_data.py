"""Data as people have it: which images, which classes, which split."""

import csv
import io
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import command
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from rich.console import Console

from se_inject import DataError
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.data.divide import _ends_of, split
from se_inject.finetune.data.folders import split_folders
from se_inject.finetune.data.images import to_rgb
from se_inject.finetune.data.loading import open_data, seed_of, seeded
from se_inject.finetune.data.parts import table_of
from se_inject.finetune.data.sources import open_sources
from se_inject.finetune.data.split import open_split, write_split
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.runs import trainer as running

SETTINGS = Settings(
    "test_resnet",
    pretrained=False,
    epochs=1,
    freeze_epochs=0,
    img_size=32,
    workers=0,
    batch_size=8,
)
QUIET = Console(quiet=True)
CONFIG = timm.data.resolve_data_config({"input_size": (3, 32, 32)})
COMMAND = (
    *("finetune", "test_resnet", "--no-pretrained", "--img-size", "32", "--workers", "0"),
    *("--batch-size", "8", "--epochs", "1"),
)

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*:UserWarning:lightning"
    ),
]


def put(path: Path, number: int = 0, **options: Any) -> None:
    """A small image of noise; another one for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)


def tree(root: Path, *folders: str, count: int = 4, suffix: str = ".png") -> Path:
    for k, folder in enumerate(folders):
        for i in range(count):
            put(root / folder / f"{i}{suffix}", 100 * k + i)
    return root


def settings_of(root: Path | str) -> Settings:
    return replace(SETTINGS, data=str(root))


def parts_of(root: Path) -> dict[str, int]:
    split = open_split(settings_of(root))
    return {name: len(part.indices) for name, part in split.parts.items()}


# --- which images --------------------------------------------------------------------------------


def test_a_run_keeps_its_split_when_files_come_and_go(tmp_path: Path) -> None:
    """Of 24 images that were validated after one new file, 22 had been trained on."""
    root = tree(tmp_path / "plain", "red", "blue", count=24)
    run = tmp_path / "run"
    assert command(*COMMAND, "--data", str(root), "--output", str(run)).returncode == 0
    with (run / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["split"] for row in rows) == {"train": 38, "val": 10}
    assert len({row["path"] for row in rows}) == 48
    assert all(row["path"].startswith(row["label"] + "/") for row in rows)
    shutil.copy(root / "red" / "0.png", root / "red" / "000new.png")
    result = command("evaluate", str(run), "--json")
    assert result.returncode == 0
    assert "1 image new since the run began, and left out: 'red/000new.png'" in result.stderr
    assert json.loads(result.stdout)["images"] == 10


def test_what_went_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "plain", "red", "blue", count=10)
    settings = settings_of(root)
    before = open_split(settings)
    write_split(before, tmp_path)
    trained = before.parts["train"].names
    (root / trained[0]).unlink()
    (root / trained[-1]).rename(root / "red" / "0123.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = open_split(settings, tmp_path)
    text = "\n".join(str(w.message) for w in caught)
    assert "2 images gone since the run began" in text
    assert "1 image new since the run began, and left out: 'red/0123.png'" in text
    assert set(after.parts["val"].names) <= set(before.parts["val"].names)
    assert set(after.parts["train"].names) <= set(trained)
    assert after.classes == before.classes


def test_a_file_that_moved_to_another_class_is_not_used(tmp_path: Path) -> None:
    root = tree(tmp_path / "plain", "red", "blue", count=6)
    settings = settings_of(root)
    before = open_split(settings)
    write_split(before, tmp_path)
    (root / "red" / "0.png").rename(root / "red" / "unique.png")
    write_split(open_split(settings), tmp_path)
    (root / "red" / "unique.png").rename(root / "blue" / "unique.png")
    with pytest.warns(UserWarning, match=r"1 image in another class .* \(now blue/unique.png\)"):
        after = open_split(settings, tmp_path)
    assert sum(len(part.indices) for part in after.parts.values()) == 11


def test_a_new_class_changes_no_label_of_a_begun_run(tmp_path: Path) -> None:
    root = tree(tmp_path / "plain", "b", "c")
    settings = settings_of(root)
    write_split(open_split(settings), tmp_path)
    tree(root, "a", count=3)
    with pytest.warns(UserWarning, match="3 images new since the run began"):
        split = open_split(settings, tmp_path)
    assert split.classes == ("b", "c")
    for name, label in zip(split.parts["train"].names, split.parts["train"].labels, strict=True):
        assert name.startswith(split.classes[label])


def test_a_damaged_split_is_one_clear_error(tmp_path: Path) -> None:
    root = tree(tmp_path / "plain", "b", "c")
    write_split(open_split(settings_of(root)), tmp_path)
    (tmp_path / "split.csv").write_text("path,label,split\nb/0.png,z,train\n")
    with pytest.raises(DataError, match=r"split\.csv or classes\.json is damaged"):
        open_split(settings_of(root), tmp_path)


def test_evaluating_on_other_data_says_what_was_trained_on(tmp_path: Path) -> None:
    root = tree(tmp_path / "plain", "red", "blue", count=10)
    running.start(settings_of(root), tmp_path / "run", QUIET)
    trained = use.load_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="16 of these images were trained on"):
        assert use.evaluate(trained, tmp_path / "run", str(root))["images"] == 20
    other = tree(tmp_path / "other", "red", "blue")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert use.evaluate(trained, tmp_path / "run", str(other))["images"] == 8


# --- which classes -------------------------------------------------------------------------------


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "nested", *(f"{c}/{p}" for c in ("cats", "dogs") for p in ("indoor", "outdoor"))
    )
    result = command(*COMMAND, "--data", str(root), "--output", str(tmp_path / "run"))
    assert result.returncode == 0
    lines = [line.split() for line in result.stderr.splitlines()]
    for row in (["class", "train", "val"], ["cats", "6", "2"], ["dogs", "6", "2"]):
        assert row in lines
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["classes"] == [
        "cats",
        "dogs",
    ]


def test_of_many_classes_the_first_and_last_few_are_shown(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"c{i}" for i in range(30)), count=2)
    lines = [line.split()[0] for line in table_of(open_split(settings_of(root)))]
    assert lines == [
        *("class", "c0", "c1", "c2", "c3", "c4", "...", "c25", "c26", "c27", "c28", "c29", "30"),
    ]
    few = tree(tmp_path / "few", *(f"c{i}" for i in range(12)), count=2)
    assert len(table_of(open_split(settings_of(few)))) == 14


# --- which split ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        (("train/a", "train/b", "val/a", "val/b"), {"train": 8, "val": 8}),
        (("Training/a", "Training/b", "Validation/a", "Validation/b"), {"train": 8, "val": 8}),
        (("TRAIN/a", "TRAIN/b", "dev/a", "dev/b"), {"train": 8, "val": 8}),
        (("train/a", "train/b", "valid/a", "valid/b"), {"train": 8, "val": 8}),
        (("Training/a", "Training/b", "Testing/a", "Testing/b"), {"train": 6, "val": 2, "test": 8}),
        (
            ("train/a", "train/b", "val/a", "val/b", "test/a", "test/b"),
            {"train": 8, "val": 8, "test": 8},
        ),
        (("train/a", "train/b"), {"train": 6, "val": 2}),
        (("train", "car", "bus"), {"train": 9, "val": 3}),  # vehicles: a class, and no split
        (("a/train", "b/train"), {"train": 6, "val": 2}),
    ],
)
def test_splits_by_the_names_of_folders(
    folders: tuple[str, ...], parts: dict[str, int], tmp_path: Path
) -> None:
    assert parts_of(tree(tmp_path, *folders)) == parts


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("test/a", "test/b"), "understood test = test/, and so no folder to train on"),
        (("val/a", "test/a"), "no folder to train on"),
        (("train/a", "train/b", "Train2/a"), "and not what 'Train2' should be"),
        (("train/a", "train/b", "holdout/a"), r"understood train = train/, and not what 'holdout'"),
        (("train/a", "val/a", "dev/a"), "two folders for one part"),
        (("train/a", "val/a", "holdout/a"), "and not what 'holdout' should be"),
        (("train_set/a", "test_set/a"), "'test_set', 'train_set' look like splits"),
    ],
)
def test_folders_that_look_like_splits_are_never_pooled(
    folders: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        split_folders(tree(tmp_path, *folders))


def test_a_folder_beside_the_splits_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "train/a", "train/b", "val/a", "val/b", "notes")
    with pytest.warns(UserWarning, match="'notes' lies beside the splits and is left out"):
        assert parts_of(tmp_path) == {"train": 8, "val": 8}


def test_the_test_part_may_lack_classes(tmp_path: Path) -> None:
    """And its labels are those of the run, not of its own folders."""
    tree(tmp_path, "train/a", "train/b", "test/b")
    with pytest.warns(UserWarning, match="no image of 'a' in the test part"):
        split = open_split(settings_of(tmp_path))
    assert split.parts["test"].labels == [1] * 4
    tree(tmp_path, "test/c")
    with pytest.raises(DataError, match="the test set has classes that are not in the training"):
        open_split(settings_of(tmp_path))


# --- what is an image ----------------------------------------------------------------------------


def test_a_class_of_webp_is_a_class(tmp_path: Path) -> None:
    tree(tmp_path / "data", "jpegs", count=8, suffix=".jpg")
    tree(tmp_path / "data", "webps", count=8, suffix=".webp")
    result = command(*COMMAND, "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"))
    assert result.returncode == 0
    assert ["webps", "6", "2"] in [line.split() for line in result.stderr.splitlines()]


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".tif", ".TIFF", ".webp", ".avif", ".jpe", ""])
def test_every_image_that_pillow_opens_counts(suffix: str, tmp_path: Path) -> None:
    tree(tmp_path, "a", "b", suffix=".png")
    for path in (tmp_path / "a").iterdir():
        with Image.open(path) as image:
            kind = {"": "PNG", ".jpe": "JPEG", ".tiff": "TIFF", ".tif": "TIFF"}
            kind_of = kind.get(suffix.lower(), suffix[1:].upper())
            image.save(path.with_suffix(suffix), format=kind_of)
        path.unlink() if suffix != ".png" else None
    data = open_data(settings_of(tmp_path), CONFIG, 0)
    assert data.classes == ("a", "b")
    for i in range(len(data.train)):
        assert data.train[i][2] == ""


def test_what_is_no_image_is_counted_by_extension(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "b" / "more.TXT").write_text("x")
    (tmp_path / "readme.md").write_text("x")
    (tmp_path / "b" / "clip.mpg").write_bytes(b"\x00\x00\x01\xb3" + bytes(100))
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match="left out") as caught:
        split = open_split(settings_of(tmp_path))
    assert split.classes == ("a", "b")
    [text] = [str(w.message) for w in caught]
    assert "these files are no images and are left out: 2 x .txt" in text
    assert "1 x .md" in text
    assert "1 x .mpg" in text
    assert "the folder empty, in which there is no image" in text


def test_junk_is_no_data(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b", ".ipynb_checkpoints", "__MACOSX/a", "a/.ipynb_checkpoints")
    for junk in ("a/._0.png", "a/Thumbs.db", "b/desktop.ini", "a/.DS_Store", "Thumbs.db"):
        (tmp_path / junk).write_bytes(b"junk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parts_of(tmp_path) == {"train": 6, "val": 2}


def test_links_that_lead_up_are_not_followed_and_others_are(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b")
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    (root / "b" / "further").symlink_to(tmp_path, target_is_directory=True)
    assert parts_of(root) == {"train": 6, "val": 2}
    tree(tmp_path / "elsewhere", "x", "y", "c", count=5)
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c", target_is_directory=True)
    assert parts_of(root) == {"train": 10, "val": 3}


def test_one_file_in_two_classes_or_two_splits_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "train/a", "train/b", "val/a", "val/b")
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/b/again.png")
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "val/a/leak.png")
    with pytest.warns(UserWarning, match="at once") as caught:
        open_split(settings_of(tmp_path))
    texts = "\n".join(str(w.message) for w in caught)
    assert "1 file in two classes at once, such as train/a/0.png = train/b/again.png" in texts
    assert "1 file in two parts at once, such as train/a/1.png = val/a/leak.png" in texts


def test_images_are_upright_in_training_evaluation_and_prediction(tmp_path: Path) -> None:
    picture = np.zeros((24, 32, 3), dtype=np.uint8)
    picture[:, 16:] = 255
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name in ("a", "b"):
        for i in range(2):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            image.save(path, exif=exif)
    source = open_sources(settings_of(tmp_path))["train"]
    upright, _ = source[0]
    assert upright.size == (24, 32)
    assert np.asarray(upright)[0].max() == 0
    assert np.asarray(upright)[-1].min() == 255


def test_deep_images_keep_their_range() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0], (ramp / 257).round())
    dark = np.full((4, 4), 200, dtype=np.uint16)  # 200 of 65535 is nearly black
    assert np.asarray(to_rgb(Image.fromarray(dark))).max() == 1
    shares = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    assert np.asarray(to_rgb(Image.fromarray(shares))).max() == 255
    flat = np.full((4, 4), 200, dtype=np.int32)
    assert np.asarray(to_rgb(Image.fromarray(flat))).max() == 200


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            path = tmp_path / name / f"{i}.gif"
            frames[0].save(path, save_all=True, append_images=frames[1:])
    image, _ = open_sources(settings_of(tmp_path))["train"][0]
    assert image.getpixel((0, 0)) == (255, 0, 0)


# --- tables and libraries ------------------------------------------------------------------------


def table(root: Path, text: str) -> str:
    path = root / "list.csv"
    path.write_text(text)
    return str(path)


def test_a_table_names_images_classes_and_splits(tmp_path: Path) -> None:
    tree(tmp_path, "x", count=8)
    rows = [f"x/{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(8)]
    data = table(tmp_path, "path,label\n" + "\n".join(rows))
    split = open_split(replace(SETTINGS, data=data))
    assert split.classes == ("cat", "dog")
    assert {name: len(p.indices) for name, p in split.parts.items()} == {"train": 6, "val": 2}
    parts = ["train"] * 4 + ["dev"] * 2 + ["Testing"] * 2
    rows = [f"{row},{part}" for row, part in zip(rows, parts, strict=True)]
    split = open_split(
        replace(SETTINGS, data=table(tmp_path, "path,label,split\n" + "\n".join(rows)))
    )
    counts = {name: len(p.indices) for name, p in split.parts.items()}
    assert counts == {"train": 4, "val": 2, "test": 2}
    image, label = split.parts["test"].source[0]
    assert (image.size, split.parts["test"].source.classes[label]) == ((32, 24), "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\nx/0.png,a\n", "must name the columns path,label"),
        ("", "must name the columns path,label"),
        ("path,label\nx/9.png,a\nx/0.png,b\n", r"1 file cannot be found: 'x/9\.png'"),
        ("path,label\nx/0.png,\n", "line 2: it has no path or no label"),
        ("path,label\nx/0.png,a\nx/0.png,b\n", r"line 3: x/0\.png is listed twice"),
        ("path,label,split\nx/0.png,a,exam\n", "line 2: the split 'exam' is not one of"),
        ("path,label,split\nx/0.png,a,test\n", "no image is in the split train"),
        ("path,label\n", "there are no images"),
    ],
)
def test_a_bad_table_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    tree(tmp_path, "x", count=1)
    with pytest.raises(DataError, match=message):
        open_split(replace(SETTINGS, data=table(tmp_path, text)))


def test_a_change_of_a_label_in_the_table_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "x", count=8)
    rows = [f"x/{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(8)]
    settings = replace(SETTINGS, data=table(tmp_path, "path,label\n" + "\n".join(rows)))
    write_split(open_split(settings), tmp_path)
    rows[0] = rows[0].replace("dog", "cat")
    table(tmp_path, "path,label\n" + "\n".join(rows))
    with pytest.warns(UserWarning, match=r"1 image in another class .*: 'x/0\.png'"):
        split = open_split(settings, tmp_path)
    assert sum(len(part.indices) for part in split.parts.values()) == 7


def hub(root: Path, **columns: Any) -> str:
    """A data set of Hugging Face on the disk, with an image column and others."""
    datasets = pytest.importorskip("datasets")
    features = {"img": datasets.Image(), **{name: kind for name, (kind, _) in columns.items()}}
    for part, numbers in (("train", range(6)), ("test", range(6, 8))):
        images = []
        for i in numbers:
            file = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file, format="PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        values = {name: [value(i) for i in numbers] for name, (_, value) in columns.items()}
        data = datasets.Dataset.from_dict(
            {"img": images, **values}, features=datasets.Features(features)
        )
        (root / "hub").mkdir(parents=True, exist_ok=True)
        data.to_parquet(root / "hub" / f"{part}-00000-of-00001.parquet")
    return f"hfds/{root / 'hub'}"


@pytest.fixture
def hub_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def settings(**columns: Any) -> Settings:
        return replace(SETTINGS, data=hub(tmp_path, **columns), data_dir=str(tmp_path / "cache"))

    return settings


def test_columns_of_hugging_face_are_found_by_their_types(
    hub_settings: Callable[..., Settings],
) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["cat", "dog"])
    settings = hub_settings(
        fine_label=(names, lambda i: i % 2), n=(datasets.Value("int64"), lambda i: i)
    )
    split = open_split(settings)
    assert split.classes == ("cat", "dog")
    assert {n: len(p.indices) for n, p in split.parts.items()} == {"train": 4, "val": 2, "test": 2}
    image, label = split.parts["test"].source[1]
    assert (image.size, label) == ((8, 8), 1)


def test_unclear_columns_have_to_be_said(hub_settings: Callable[..., Settings]) -> None:
    datasets = pytest.importorskip("datasets")
    fine = datasets.ClassLabel(names=["cat", "dog", "cow"])
    coarse = datasets.ClassLabel(names=["small", "large"])
    settings = hub_settings(
        fine_label=(fine, lambda i: i % 3),
        coarse_label=(coarse, lambda i: i % 2),
        word=(datasets.Value("string"), lambda i: "yes" if i % 2 else "no"),
    )
    with pytest.raises(DataError, match=r"give --label-column\. Its columns are img, fine_label"):
        open_split(settings)
    assert open_split(replace(settings, label_column="coarse_label")).classes == ("small", "large")
    assert open_split(replace(settings, label_column="word")).classes == ("no", "yes")
    with pytest.raises(DataError, match=r"--image-column picture: .* has the columns"):
        open_split(replace(settings, label_column="word", image_column="picture"))


def test_data_have_to_be_said() -> None:
    for args in ((), ("--data", "")):
        result = command("finetune", "test_resnet", *args)
        assert result.returncode in (1, 2)
        assert "--data" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path / "data", "a", "b")
    assert parts_of(Path("~/data")) == {"train": 6, "val": 2}
    result = command(
        *(*COMMAND, "--data", "~/data", "--output", "~/run"), env={"HOME": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    assert not os.path.exists("~")


def test_the_numbers_of_an_image_are_those_of_its_seed_and_nothing_else_moves() -> None:
    before = torch.get_rng_state()
    with seeded(3, 1, 7):
        drawn = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with isolate_rng(include_cuda=False):
        torch.manual_seed(seed_of(3, 1, 7))
        assert torch.equal(drawn, torch.rand(4))


def test_training_keeps_an_image_of_each_class() -> None:
    train, val = split([0, 1, 1, 2, 2, 2, 2, 2, 2, 2], 0.9)
    assert sorted(train + val) == list(range(10))
    assert 0 in train  # the only image of its class
    assert {i for i in val if i in (1, 2)} != {1, 2}
    assert len([i for i in train if i > 2]) == 1


def test_copies_are_told_apart_by_their_ends(tmp_path: Path) -> None:
    start = bytes(1 << 16)
    texts = {"a": start + b"one", "b": start + b"two", "c": start + b"one", "d": b"one" + start}
    found = {}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
        found[name] = _ends_of(tmp_path / name, len(text))
    assert found["a"] == found["c"]
    assert len({found["a"], found["b"], found["d"]}) == 3
