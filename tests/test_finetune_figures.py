"""Figures that mean what they say: which epoch, which images, which share is guessing."""

import csv
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import command
from PIL import Image
from rich.console import Console
from sklearn import metrics
from test_finetune_data import COMMAND, CONFIG, SETTINGS, settings_of, tree
from torch import nn

from se_inject import inject_se
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.data.loading import balanced_weights, loader, open_data
from se_inject.finetune.data.split import open_split, write_split
from se_inject.finetune.figures import results
from se_inject.finetune.figures.measure import by_class, figures_of, measure
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.runs import trainer as running
from se_inject.finetune.training import arm as arms
from se_inject.finetune.training.callbacks import RunFolder
from se_inject.finetune.training.network import zero_branches
from se_inject.finetune.training.recipe import Recipe

QUIET = Console(quiet=True)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*:UserWarning:lightning",
    "ignore:Checkpoint directory",
)


def colors(root: Path, shade: int = 150, **counts: int) -> Path:
    """Classes that can be told apart: each has a colour of its own."""
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            color = np.zeros((8, 8, 3), dtype=np.uint8)
            color[..., k % 3] = shade + i % 100
            color[0, 0, 1] = i
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(color).save(path)
    return root


# --- which epoch ---------------------------------------------------------------------------------


class _Validated:
    """A trainer and a recipe after the validation of one epoch, as the callback sees them."""

    def __init__(self, epoch: int, accuracy: float, loss: float) -> None:
        self.current_epoch, self.is_global_zero = epoch, True
        self.top1 = self.val_loss = self
        self.values = [torch.tensor(accuracy), torch.tensor(loss)]

    def compute(self) -> Any:
        return self.values.pop(0)


@pytest.mark.parametrize(("select", "chosen"), [("best", 3), ("last", 4)])
def test_the_best_epoch_is_chosen_and_the_loss_decides_between_equal_ones(
    select: Any, chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from se_inject.finetune.training import callbacks

    saved: list[int] = []
    history = RunFolder(tmp_path, "se", 0, replace(SETTINGS, select=select))
    monkeypatch.setattr(
        callbacks, "save_network", lambda *_, **__: saved.append(history.best_epoch)
    )
    monkeypatch.setattr(callbacks, "Recipe", _Recipe)
    figures = [(0.5, 1.0), (0.75, 0.9), (0.75, 0.8), (0.75, 0.85)]
    for epoch, (accuracy, loss) in enumerate(figures):
        seen = _Recipe(epoch, accuracy, loss)
        history.on_validation_epoch_end(seen, seen)  # type: ignore[arg-type]
    assert history.best_epoch == saved[-1] == chosen
    assert history.best == 0.75
    again = RunFolder(tmp_path, "se", 0, SETTINGS)
    again.load_state_dict(history.state_dict())
    assert (again.best, again.best_loss, again.best_epoch) == (
        history.best,
        history.best_loss,
        chosen,
    )


def test_the_test_part_is_measured_with_the_chosen_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two epochs is chosen here, and the network has those of the second."""
    root = colors(tmp_path / "data" / "train", a=20, b=20)
    colors(root.parent / "test", 100, a=3, b=3)
    images, seen = torch.randn(2, 3, 32, 32), []
    choose = RunFolder.on_validation_epoch_end

    def first(self: RunFolder, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            choose(self, trainer, module)

    def watched(scores_of: Any, *args: Any) -> Any:
        with torch.no_grad():
            seen.append(scores_of(images))
        return measure(scores_of, *args)

    monkeypatch.setattr(RunFolder, "on_validation_epoch_end", first)
    monkeypatch.setattr(arms, "measure", watched)
    settings = replace(settings_of(root.parent), epochs=2, lr=0.05)
    running.start(settings, tmp_path / "run", QUIET)
    with torch.no_grad():
        chosen = use.load_run(tmp_path / "run").scores(images)
    torch.testing.assert_close(seen[0], chosen)


class _Recipe(_Validated):
    network = None


def test_the_verdict_compares_figures_without_a_choice() -> None:
    def arm(*values: tuple[float, float], test: float | None = None) -> list[dict[str, Any]]:
        return [
            {"val_acc": best, "last_val_acc": last, "test": test and {"top1": test + 0.001 * i}}
            for i, (best, last) in enumerate(values)
        ]

    se, control = arm((0.9, 0.6), (0.9, 0.7)), arm((0.6, 0.6), (0.5, 0.7))
    said = results.verdict({"se": se, "control": control})
    assert said.startswith(
        "SE blocks change the accuracy in the last epoch by +0.00 points (95 % interval ±0.00"
    )
    se, control = arm((0.9, 0.6), (0.9, 0.7), test=0.7), arm((0.6, 0.6), (0.5, 0.7), test=0.8)
    said = results.verdict({"se": se, "control": control})
    assert said.startswith("SE blocks change the accuracy on the test images by -10.00 points")


def test_the_command_says_which_epoch_and_keeps_the_test_apart(tmp_path: Path) -> None:
    root = colors(tmp_path / "data" / "train", red=20, green=20)
    colors(tmp_path / "data" / "Test", 100, red=7, green=5)
    run = tmp_path / "run"
    result = command(
        *(*COMMAND, "--epochs", "2", "--data", str(root.parent), "--output", str(run)),
    )
    assert result.returncode == 0, result.stderr
    assert "test accuracy" in result.stdout
    assert "the validation accuracy is that of the best of 2 epochs, epoch" in result.stdout
    summary = json.loads((run / "summary.json").read_text())
    arm = json.loads((run / "arm.json").read_text())
    assert arm["test"]["images"] == 12
    assert arm["best_epoch"] in (1, 2)
    assert summary["arms"]["se"]["test"]["mean"] == arm["test"]["top1"]
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert arm["val_acc"] == float(rows[arm["best_epoch"] - 1]["val_acc"])
    assert arm["last_val_acc"] == float(rows[-1]["val_acc"])
    assert "val_top5" not in rows[0]  # of two classes
    # The test figures are of the chosen weights.
    trained = use.load_run(run)
    data = open_data(trained.settings, trained.data_config, 0)
    assert data.test is not None
    with torch.no_grad():
        found = measure(trained.scores, data.test, trained.settings, 2)
    assert found.figures.top1 == pytest.approx(arm["test"]["top1"], abs=1e-6)


# --- imbalance -----------------------------------------------------------------------------------


def test_figures_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    true = random.choice(4, 300, p=[0.7, 0.2, 0.1, 0.0])  # one class without images
    predicted = np.where(random.random(300) < 0.6, true, random.integers(0, 4, 300))
    matrix = torch.from_numpy(metrics.confusion_matrix(true, predicted, labels=range(4)))
    figures = figures_of(matrix)
    assert figures.top1 == pytest.approx(metrics.accuracy_score(true, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the class that is only predicted
        balanced = metrics.balanced_accuracy_score(true, predicted)
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            true, predicted, labels=range(4), zero_division=0
        )
    assert figures.balanced == pytest.approx(balanced)
    assert figures.macro_f1 == pytest.approx(f1[:3].mean())
    assert figures.majority == pytest.approx((true == 0).mean())
    for ours, theirs in zip(by_class(matrix), (precision, recall, f1), strict=True):
        assert ours.numpy() == pytest.approx(theirs)
    assert not np.allclose(precision, recall)


def test_guessing_the_largest_class_is_no_balanced_accuracy(tmp_path: Path) -> None:
    """200, 20 and 4 images: 88.89 % was the share of the first class."""
    root = colors(tmp_path / "data", many=200, some=20, few=4)
    images = open_data(settings_of(root), CONFIG, 0)
    scores = torch.zeros(3)
    scores[images.classes.index("many")] = 1
    found = measure(lambda x: scores.repeat(len(x), 1), images.val, SETTINGS, 3).to_dict()
    assert found["top1"] == found["majority_share"] == pytest.approx(40 / 45)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["top5"] is None


def test_one_class_alone_has_no_auroc(tmp_path: Path) -> None:
    images = open_data(settings_of(colors(tmp_path / "data", a=40, b=40)), CONFIG, 0).val
    kept = [i for i, label in enumerate(images.labels) if label == 0]
    images.indices = [images.indices[i] for i in kept]
    images.labels = [0] * len(kept)
    found = measure(lambda x: torch.randn(len(x), 2), images, SETTINGS, 2)
    assert found.images == len(kept)
    assert found.auroc == [None, None]


def test_evaluate_gives_precision_recall_and_auroc_of_each_class(tmp_path: Path) -> None:
    root = colors(tmp_path / "data", a=20, b=20, c=20)
    running.start(settings_of(root), tmp_path / "run", QUIET)
    result = command("evaluate", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert {"precision", "recall", "F1", "AUROC", "balanced", "macro"} <= set(words)
    assert "top-5" not in words
    trained = use.load_run(tmp_path / "run")
    found = use.evaluate(trained, tmp_path / "run")
    scores, labels = [], []
    images = open_data(trained.settings, trained.data_config, 0).val
    for x, y, _ in loader(images, SETTINGS, training=False, epoch=0, rank=0, world=1):
        with torch.no_grad():
            scores.append(trained.scores(x))
        labels.append(y)
    score, label = torch.cat(scores).softmax(1).numpy(), torch.cat(labels).numpy()
    for i, name in enumerate("abc"):
        area = metrics.roc_auc_score(label == i, score[:, i])
        assert found["by_class"][name]["auroc"] == pytest.approx(area, abs=1e-6)
        assert found["by_class"][name]["images"] == 4


def test_a_class_without_a_validation_image_is_named(tmp_path: Path) -> None:
    root = colors(tmp_path, a=9, b=9, lonely=1)
    with pytest.warns(UserWarning, match="no image of 'lonely' in the val part"):
        open_data(settings_of(root), CONFIG, 0)


def test_balanced_draws_as_many_of_each_class(tmp_path: Path) -> None:
    data = open_data(settings_of(colors(tmp_path, a=160, b=16)), CONFIG, 0)
    settings = replace(SETTINGS, sampler="balanced", batch_size=16)

    def drawn(settings: Settings, epoch: int, rank: int = 0, world: int = 1) -> list[int]:
        batches = loader(data.train, settings, training=True, epoch=epoch, rank=rank, world=world)
        return [label for _, y, _ in batches for label in y.tolist()]

    labels = drawn(settings, 0)
    assert 0.35 < np.mean(labels) < 0.65
    assert np.mean(drawn(SETTINGS, 0)) < 0.15
    assert drawn(settings, 0) == labels != drawn(settings, 1)
    halves = drawn(settings, 0, 0, 2) + drawn(settings, 0, 1, 2)
    assert sorted(halves) == sorted(labels)


def test_class_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    data = open_data(settings_of(colors(tmp_path, a=20, b=10, c=5)), CONFIG, 0)
    weights = balanced_weights(data.train, 3)
    labels = np.array(data.train.labels)
    assert weights.numpy() == pytest.approx(
        compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    )
    network = inject_se(timm.create_model("test_resnet", num_classes=3))
    settings = replace(SETTINGS, class_weights="balanced", label_smoothing=0.0)
    recipe = Recipe(network, settings, 3, 0, weights=weights)
    scores, label = torch.randn(8, 3), torch.arange(8) % 3
    expected = nn.functional.cross_entropy(scores, label, weight=weights)
    assert torch.equal(recipe._smoothing(scores, label), expected)
    mixed = torch.eye(3)[label].lerp(torch.eye(3)[label.flip(0)], 0.3)  # as mixup makes labels
    expected = nn.functional.cross_entropy(scores, mixed, weight=weights)
    assert torch.equal(recipe._soft(scores, mixed), expected)


@pytest.mark.parametrize("options", [{"class_weights": "balanced"}, {"sampler": "balanced"}])
def test_a_balanced_run_trains_and_evaluates(options: dict[str, Any], tmp_path: Path) -> None:
    root = colors(tmp_path / "data", a=40, b=8)
    summary = running.start(replace(settings_of(root), **options), tmp_path / "run", QUIET)
    found = use.evaluate(use.load_run(tmp_path / "run"), tmp_path / "run")
    assert found["top1"] == pytest.approx(summary["arms"]["se"]["mean"], abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(
        summary["arms"]["se"]["balanced_accuracy"], abs=1e-6
    )


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_a_run_weighs_the_classes_as_it_was_told(
    class_weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    step = Recipe.training_step

    def watched(self: Recipe, batch: Any, index: int) -> Any:
        seen.append(self._smoothing.weight)
        return step(self, batch, index)

    monkeypatch.setattr(Recipe, "training_step", watched)
    root = colors(tmp_path / "data", a=15, b=5)
    settings = replace(settings_of(root), class_weights=class_weights)
    running.start(settings, tmp_path / "run", QUIET)
    if class_weights == "none":
        assert seen[0] is None
    else:
        assert seen[0].tolist() == pytest.approx([2 / 3, 2.0])


# --- zero branches -------------------------------------------------------------------------------


def test_branches_that_are_multiplied_by_zero_are_found() -> None:
    example = torch.empty(2, 3, 32, 32)
    network = inject_se(timm.create_model("test_resnet"), example_input=example)
    names = zero_branches(network, example)
    assert (
        names
        == [n for n, m in network.named_modules() if type(m).__name__.startswith("SE")][
            : len(names)
        ]
    )
    assert len(names) == 4
    with torch.no_grad():
        network.get_submodule(names[0]).bn2.weight.fill_(1.0)
    assert zero_branches(network, example) == names[1:]
    assert network.training


def test_a_frozen_random_base_is_warned_of_and_by_default_not_frozen(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b")
    settings = replace(settings_of(root), freeze_epochs=1)
    with pytest.warns(UserWarning, match=r"4 blocks \('layer1\.0'.*multiplied by 0"):
        running.start(settings, tmp_path / "frozen", QUIET)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*multiplied by 0")
        running.start(replace(settings, freeze_epochs=None), tmp_path / "free", QUIET)
    assert json.loads((tmp_path / "free" / "config.json").read_text())["freeze_epochs"] == 0


@pytest.mark.parametrize(
    ("change", "epochs"),
    [
        ({"pretrained": True}, 2),
        ({"pretrained": True, "epochs": 1}, 0),
        ({"pretrained": True, "epochs": 2}, 1),
        ({"pretrained": False}, 0),
        ({"pretrained": False, "checkpoint": "x.pth"}, 2),
        ({"pretrained": False, "freeze_epochs": 3}, 3),
    ],
)
def test_how_long_the_base_is_frozen(change: dict[str, Any], epochs: int) -> None:
    assert (
        replace(SETTINGS, **{"epochs": 10, "freeze_epochs": None, **change}).frozen_epochs == epochs
    )


# --- what a table says is what was counted -------------------------------------------------------


def test_a_spread_is_that_of_a_sample() -> None:
    own = [0.5, 0.6, 0.9]
    arm = {
        "arm": "se",
        "params": 1,
        "macs": 1,
        "seconds": 1.0,
        "unreadable": [],
        "classes": ["a"],
        "input_size": [3, 8, 8],
        "select": "best",
        "best_epoch": 1,
    }
    row = {"epoch": 1, "val_balanced": 0.25, "val_macro_f1": 0.75, "val_majority": 0.5}
    rows = [row, row | {"epoch": 2, "val_balanced": 1.0, "val_macro_f1": 1.0, "val_majority": 1.0}]
    found = results.summarize(
        [
            arm
            | {"seed": i, "val_acc": a, "last_val_acc": a / 2, "history": rows}
            | {"test": {"top1": a / 4}}
            for i, a in enumerate(own)
        ]
    )["arms"]["se"]
    assert found["mean"] == pytest.approx(2 / 3)
    assert found["sd"] == pytest.approx(np.std(own, ddof=1))
    assert found["last"]["mean"] == pytest.approx(1 / 3)
    assert found["last"]["sd"] == pytest.approx(np.std(own, ddof=1) / 2)
    assert found["test"]["mean"] == pytest.approx(1 / 6)
    figures = (found["balanced_accuracy"], found["macro_f1"], found["majority_share"])
    assert figures == (0.25, 0.75, 0.5)  # of the chosen epoch, and not of the last


class _Always(use.Trained):
    """A network that takes everything for the first class."""

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)


def test_the_rows_of_the_matrix_are_the_true_classes(tmp_path: Path) -> None:
    root = colors(tmp_path / "data", a=10, b=20)
    settings = settings_of(root)
    write_split(open_split(settings), tmp_path)
    run = _Always(nn.Identity(), settings, ("a", "b"), CONFIG)
    found = use.evaluate(run, tmp_path)
    with (tmp_path / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["true \\ predicted", "a", "b"], ["a", "2", "0"], ["b", "4", "0"]]
    assert found["classes"] == {"a": 1.0, "b": 0.0}
    of_a, of_b = found["by_class"]["a"], found["by_class"]["b"]
    assert (of_a["recall"], of_b["recall"]) == (1.0, 0.0)
    assert (of_a["precision"], of_b["precision"]) == (pytest.approx(1 / 3), 0.0)
    assert of_a["f1"] == pytest.approx(1 / 2)
    assert (of_a["images"], of_b["images"]) == (2, 4)
    assert (found["majority_share"], found["balanced_accuracy"]) == (pytest.approx(2 / 3), 0.5)


@pytest.mark.parametrize("better", [0, 1])
def test_the_best_seed_gives_the_weights_of_the_run(better: int, run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"seeds": 2}))
    for arm in ("se", "control"):
        shutil.copytree(run / f"{arm}-0", run / f"{arm}-1")
        for seed in (0, 1):
            path = run / f"{arm}-{seed}" / "arm.json"
            change = {"seed": seed, "val_acc": 0.5 + 0.25 * (seed == better)}
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
            (run / f"{arm}-{seed}" / "best.safetensors").write_bytes(f"{arm} {seed}".encode())
    running.resume(run, QUIET)
    assert (run / "best.safetensors").read_bytes() == f"se {better}".encode()
