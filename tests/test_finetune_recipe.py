"""The recipe: optimizers, schedules, augmentation, loggers, files of options, numbers found."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import yaml
from rich.console import Console
from test_finetune_data import COMMAND, CONFIG, SETTINGS, settings_of, tree
from timm.layers import DropPath
from torch import nn

from se_inject import ArgumentError, TrainingError, inject_se
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.data.loading import transforms
from se_inject.finetune.data.parts import limited
from se_inject.finetune.data.split import open_split
from se_inject.finetune.options.choices import LOGGERS
from se_inject.finetune.options.config import read_config, read_yaml
from se_inject.finetune.runs import trainer as running
from se_inject.finetune.training import callbacks, tune
from se_inject.finetune.training.callbacks import RunFolder
from se_inject.finetune.training.network import base_of
from se_inject.finetune.training.optimizer import factor_of, groups_of, optimizer_of
from se_inject.finetune.training.prepare import prepare
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


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data"), "a", "b", count=8)


def small(**options: Any) -> Recipe:
    network = inject_se(timm.create_model("test_resnet", num_classes=3))
    return Recipe(network, replace(SETTINGS, **options), 3, 0)


# --- optimizer and schedule ----------------------------------------------------------------------


def test_the_default_schedule_rises_and_falls_as_ever() -> None:
    factor = factor_of(replace(SETTINGS, epochs=10), 100)
    assert [factor(i) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(5) == 1.0
    assert factor(52) == pytest.approx(0.5, abs=0.02)
    assert factor(99) == pytest.approx(0.0, abs=1e-3)
    assert [factor(i) for i in range(100)] == [factor(i) for i in range(100)]


@pytest.mark.parametrize(
    ("sched", "at_the_middle", "at_the_end"),
    [("poly", 0.5, 0.0), ("none", 1.0, 1.0), ("step", 0.1, 0.01), ("cosine", 0.5, 0.0)],
)
def test_schedules_in_the_words_of_timm(
    sched: Any, at_the_middle: float, at_the_end: float
) -> None:
    factor = factor_of(replace(SETTINGS, epochs=10, sched=sched, lr_warmup=0.0), 1000)
    assert factor(0) == 1.0
    assert factor(500) == pytest.approx(at_the_middle)
    assert factor(999) == pytest.approx(at_the_end, abs=2e-3)
    assert factor(5000) == pytest.approx(at_the_end, abs=1e-9)


def test_the_rate_rises_for_as_many_epochs_as_are_said() -> None:
    factor = factor_of(replace(SETTINGS, epochs=10, lr_warmup=2.5), 40)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == 1.0
    assert factor(10) == 1.0
    assert factor(11) < 1.0


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("sgd", "SGD"), ("lamb", "Lamb")])
def test_optimizers_in_the_words_of_timm(name: str, kind: str) -> None:
    recipe = small(opt=name)
    made = optimizer_of(recipe.network, recipe.new, recipe.settings, 10)
    assert type(made["optimizer"]).__name__ == kind
    decays = {group["weight_decay"] for group in made["optimizer"].param_groups}
    assert decays == {0.0, 0.05}
    with pytest.raises(
        ArgumentError, match=r"--opt adamww is not an optimizer of timm\. .*'adamw'"
    ):
        optimizer_of(recipe.network, recipe.new, replace(recipe.settings, opt="adamww"), 10)


def test_layer_decay_slows_the_first_layers_of_the_base_alone() -> None:
    recipe = small(layer_decay=0.5)
    names = {id(p): name for name, p in recipe.network.named_parameters()}
    groups = list(groups_of(recipe.network, recipe.new, recipe.settings))
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    assert rates["conv1.0.weight"] < rates["layer1.0.conv1.weight"] < rates["layer4.0.conv2.weight"]
    assert rates["layer1.0.se.fc1.weight"] == rates["fc.weight"] == recipe.settings.lr
    assert rates["layer4.0.conv2.weight"] <= 0.1 * recipe.settings.lr


def test_biases_and_norms_do_not_decay() -> None:
    recipe = small()
    names = {id(p): name for name, p in recipe.network.named_parameters()}
    groups = list(groups_of(recipe.network, recipe.new, recipe.settings))
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    of_norms = {
        f"{name}.weight"
        for name, module in recipe.network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert of_norms
    spared = {name for name, value in decay.items() if value == 0}
    assert spared == of_norms | {name for name in decay if name.endswith("bias")}
    assert all(value in (0, recipe.settings.weight_decay) for value in decay.values())


class Steps(pl.Callback):
    """The largest rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(max(group["lr"] for group in optimizer.param_groups))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Every run of the test is watched."""
    seen = Steps()
    original = pl.Trainer.__init__

    def watched(self: pl.Trainer, *args: Any, **options: Any) -> None:
        options["callbacks"] = [*options["callbacks"], seen]
        original(self, *args, **options)

    monkeypatch.setattr(pl.Trainer, "__init__", watched)
    return seen


def test_a_run_follows_the_schedule(data: Path, steps: Steps, tmp_path: Path) -> None:
    settings = replace(settings_of(data), batch_size=4, epochs=2)
    running.start(settings, tmp_path / "run", QUIET)
    factor = factor_of(settings, 6)
    assert steps.rates == pytest.approx([settings.lr * factor(i) for i in range(6)])
    assert len(set(steps.rates)) > 3


def test_batches_are_accumulated(data: Path, steps: Steps, tmp_path: Path) -> None:
    settings = replace(settings_of(data), batch_size=4, accumulate=3)
    running.start(settings, tmp_path / "run", QUIET)
    assert len(steps.rates) == 1  # three batches


def test_gradients_are_clipped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: Callable[[], Any]) -> Any:
        def observed() -> Any:
            loss = closure()  # with it the gradients come and are clipped
            grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.stack(grads).norm()))
            return loss

        return step(self, observed)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for clip in (0.01, 0.0):
        running.start(replace(settings_of(data), clip=clip), tmp_path / f"{clip}", QUIET)
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[-1] > 0.02


def test_the_loss_is_smoothed_and_the_figures_are_not() -> None:
    scores, labels = torch.randn(8, 3), torch.arange(8) % 3
    for smoothing in (0.0, 0.3):
        loss = small(label_smoothing=smoothing)._smoothing(scores, labels)
        expected = nn.functional.cross_entropy(scores, labels, label_smoothing=smoothing)
        assert torch.equal(loss, expected)
    plain = nn.functional.cross_entropy(scores, labels)
    assert not torch.equal(small(label_smoothing=0.3)._smoothing(scores, labels), plain)


def test_every_image_counts_once_in_the_loss_of_the_validation() -> None:
    recipe = small(label_smoothing=0.3).eval()
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10) % 3
    with torch.no_grad():
        for i, part in enumerate((slice(0, 8), slice(8, 10))):
            recipe.validation_step((images[part], labels[part], []), i)
        expected = nn.functional.cross_entropy(recipe.network(images), labels)
    torch.testing.assert_close(recipe.val_loss.compute(), expected)


def test_mixed_labels_are_smoothed_as_others_are() -> None:
    mixup = small(mixup=0.4, label_smoothing=0.3)._mixup
    assert mixup is not None
    _, targets = mixup(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(targets, torch.tensor([[0.8, 0.1, 0.1]]).repeat(4, 1))
    assert small()._mixup is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_step_draws_follows_from_seed_and_step_alone(accumulate: int) -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            drawn.append(torch.rand(()).item())
            return self.fc(x.mean((2, 3)))

    class OneProcess:
        world_size, global_rank, global_step, current_epoch = 1, 0, 5, 0

    def draw(seed: int, index: int) -> float:
        recipe = Recipe(Drawn(), replace(SETTINGS, accumulate=accumulate, train="se+head"), 3, seed)
        recipe._trainer = OneProcess()  # type: ignore[assignment]
        recipe._fabric = None
        recipe.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        recipe.training_step((torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), []), index)
        return drawn[-1]

    drawn: list[float] = []
    first = draw(0, 0)
    torch.rand(7)
    assert draw(0, 0) == first != draw(1, 0)
    assert (draw(0, 1) == first) == (accumulate == 1)  # the next part of a step is another


def test_the_average_of_the_weights_is_what_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a decay of nearly 1 the average stays where the first step led."""
    from safetensors.torch import load_file

    after_steps: list[torch.Tensor] = []
    monkeypatch.setattr(
        Recipe,
        "on_train_batch_end",
        lambda self, *_: after_steps.append(self.network.fc.weight.detach().clone()),
    )
    settings = replace(settings_of(data), batch_size=4, lr=0.05)
    for ema, kept_step in ((None, -1), (0.999999, 0)):
        after_steps.clear()
        running.start(replace(settings, ema=ema), tmp_path / f"{ema}", QUIET)
        kept = load_file(tmp_path / f"{ema}" / "best.safetensors")["fc.weight"]
        torch.testing.assert_close(kept, after_steps[kept_step], atol=1e-4, rtol=0)
        assert (after_steps[0] - after_steps[-1]).abs().max() > 0.01


def test_statistics_follow_closely_where_they_move() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    Recipe(inject_se(network), replace(SETTINGS, bn_stats="moving"), 3, 0)
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_a_checkpoint_keeps_all_of_what_a_run_knows(tmp_path: Path) -> None:
    one, two = (RunFolder(tmp_path, "se", 0, SETTINGS) for _ in range(2))
    one.rows = [{"epoch": 1, "val_acc": 0.5}, {"epoch": 2, "val_acc": 0.4}]
    one.best, one.best_loss, one.best_epoch, one.seconds = 0.5, 1.5, 1, 12.0
    one.unreadable = dict.fromkeys(["b.png: broken", "a.png: broken"])
    two.load_state_dict(one.state_dict())
    assert two.state_dict() == one.state_dict()
    assert list(two.unreadable) == ["b.png: broken", "a.png: broken"]


# --- early stop, NaN in the first epoch ----------------------------------------------------------


def test_an_arm_stops_where_nothing_gets_better(data: Path, tmp_path: Path) -> None:
    settings = replace(settings_of(data), epochs=9, lr=1e-9, early_stop=2)
    summary = running.start(settings, tmp_path / "run", QUIET)
    assert summary["arms"]["se"]["epochs"] == 3
    before = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    (tmp_path / "run" / "arm.json").unlink()  # killed before it was written
    assert running.resume(tmp_path / "run", QUIET)["arms"]["se"]["epochs"] == 3
    after = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert before["global_step"] == after["global_step"]


def test_a_loss_that_is_no_number_in_the_first_epoch(
    data: Path, tmp_path: Path, here: Here
) -> None:
    with pytest.raises(TrainingError, match=r"step \d+ of the validation\. No weights are kept"):
        running.start(replace(settings_of(data), lr=1e30, clip=0.0), tmp_path / "run", QUIET)
    status, _, err = here(*COMMAND, "--data", str(data), "--output", str(tmp_path / "run"))
    assert status == 0, err  # nothing stands in the way of the right command


def test_an_arm_that_gets_better_goes_on() -> None:
    stop = callbacks.EarlyStop(2)
    assert (stop.monitor, stop.patience) == ("val_acc", 2)
    found = [
        stop._evaluate_stopping_criteria(torch.tensor(accuracy))[0]
        for accuracy in (0.5, 0.6, 0.7, 0.65, 0.66)
    ]
    assert found == [False, False, False, False, True]


# --- images --------------------------------------------------------------------------------------


def names_of(transform: Any) -> dict[str, Any]:
    return {type(t).__name__: t for t in transform.transforms}


def test_augmentation_in_the_words_of_timm() -> None:
    options: dict[str, Any] = {
        "scale": 0.25,
        "hflip": 0.3,
        "vflip": 0.2,
        "color_jitter": 0.4,
        "reprob": 0.6,
    }
    found = names_of(transforms(replace(SETTINGS, **options), CONFIG)[0])
    assert found["RandomResizedCropAndInterpolation"].scale == (0.25, 1.0)
    assert found["RandomHorizontalFlip"].p == 0.3
    assert found["RandomVerticalFlip"].p == 0.2
    assert found["ColorJitter"].brightness == pytest.approx((0.6, 1.4))
    assert found["RandomErasing"].probability == 0.6
    plain = names_of(transforms(replace(SETTINGS, data="flowers"), CONFIG)[0])
    assert not {"ColorJitter", "RandomErasing", "RandomVerticalFlip"} & plain.keys()
    assert plain["RandomHorizontalFlip"].p == 0.5


def test_digits_are_not_mirrored_unless_somebody_asks() -> None:
    assert "RandomHorizontalFlip" not in names_of(transforms(SETTINGS, CONFIG)[0])
    asked = names_of(transforms(replace(SETTINGS, hflip=0.5), CONFIG)[0])
    assert asked["RandomHorizontalFlip"].p == 0.5


def test_drop_path_is_the_network_of_timm(tmp_path: Path) -> None:
    network, _ = base_of(replace(SETTINGS, drop_path=0.3))
    rates = [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.3)
    for model, message in (
        ("vgg11", "vgg11 has no stochastic depth: leave out --drop-path"),
        ("torchvision/resnet18", "--drop-path is for models of timm"),
        ("timm:create_model", "is your own code. --drop-path"),
    ):
        with pytest.raises(ArgumentError, match=message):
            base_of(replace(SETTINGS, model=model, drop_path=0.3))


def test_a_dry_run_takes_few_images_of_all_classes(data: Path, tmp_path: Path) -> None:
    settings = replace(settings_of(data), limit=3)
    split = limited(open_split(settings), 3)
    assert {name: len(part.indices) for name, part in split.parts.items()} == {"train": 3, "val": 3}
    assert [set(part.labels) for part in split.parts.values()] == [{0, 1}, {0, 1}]
    running.start(settings, tmp_path / "run", QUIET)
    assert json.loads((tmp_path / "run" / "arm.json").read_text())["history"][0]["epoch"] == 1
    found = use.evaluate(use.load_run(tmp_path / "run"), tmp_path / "run")
    assert found["images"] == 3  # the same as in training
    assert limited(split, None) is split


# --- options that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_warmup": 3.0}, "--lr-warmup 3.0 must be at most --epochs 1"),
        ({"color_jitter": 0.4, "aa": "rand-m9"}, "--color-jitter and --aa exclude each other"),
        ({"logger": "tensorbord"}, "--logger tensorbord is not one of tensorboard, csv"),
        ({"reprob": 1.5}, "--reprob 1.5 must be between 0 and 1"),
        ({"accumulate": 0}, "--accumulate 0 must be 1 or more"),
        ({"lr": float("inf")}, "--lr inf must be above 0"),
    ],
)
def test_options_that_cannot_work(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        running.start(replace(SETTINGS, **change), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "nonsense"),
        ("--aa", "nonsense"),
        ("--devices", "0"),
        ("--seed", "-1"),
        ("--lr", "nan"),
        ("--lr", "fast"),
        ("--ema", "1"),
        ("--opt", "nonsense"),
        ("--sched", "nonsense"),
        ("--logger", "nonsense"),
        ("--drop-path", "1"),
    ],
)
def test_no_option_ends_in_a_traceback(
    options: tuple[str, str], data: Path, tmp_path: Path, here: Here
) -> None:
    args = (*COMMAND, "--data", str(data), "--output", str(tmp_path / "run"), *options)
    status, _, err = here(*args)
    assert status in (1, 2)
    assert "Traceback" not in err
    assert options[0] in err


# --- loggers -------------------------------------------------------------------------------------


def test_tensorboard_gets_real_event_files(data: Path, tmp_path: Path, here: Here) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    status, _, err = here(
        *(*COMMAND, "--epochs", "2", "--data", str(data), "--output", str(run)),
        *("--logger", "tensorboard", "--logger", "csv"),
    )
    assert status == 0, err
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = json.loads((run / "arm.json").read_text())["history"]
    logged = [event.value for event in events.Scalars("val_acc")]
    assert logged == pytest.approx([row["val_acc"] for row in rows])
    assert {"train_loss_epoch", "val_loss"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("lr-") for tag in events.Tags()["scalars"])
    assert "val_acc" in (run / "csv" / "version_0" / "metrics.csv").read_text()
    assert read_config(run).loggers == ("tensorboard", "csv")


def test_a_logger_that_is_not_installed_says_what_to_install(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from se_inject.finetune.training import loggers

    def missing(folder: Path) -> Any:
        raise ModuleNotFoundError("no wandb")

    monkeypatch.setitem(loggers._LOGGERS, "wandb", missing)  # type: ignore[misc]
    with pytest.raises(
        ArgumentError, match=r"--logger wandb needs .* pip install wandb, or 'se-inject"
    ):
        running.start(replace(settings_of(data), logger="wandb"), tmp_path / "run", QUIET)
    assert set(loggers._LOGGERS) == set(LOGGERS)


# --- files of options ----------------------------------------------------------------------------


def test_a_run_writes_what_another_begins_from(data: Path, tmp_path: Path, here: Here) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--opt", "sgd", "--lr", "3e-4", "--include", "layer1.*", "--hflip", "0.1")
    assert here(*COMMAND, "--data", str(data), "--output", str(one), *options)[0] == 0
    status, _, err = here(
        *("finetune", "--config", str(one / "config.yaml"), "--output", str(two), "--seed", "7")
    )
    assert status == 0, err
    assert read_config(two) == replace(read_config(one), seed=7)
    assert read_config(two).opt == "sgd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "'epoch' is not a setting"),
        ("epochs: many", "epochs is 'many', but must be a whole number"),
        ("lr: fast", "lr is 'fast', but must be a number"),
        ("- 1", "it has no settings by name"),
        ("a: [", "cannot be read"),
        ("", "it has no settings by name"),
    ],
)
def test_a_file_of_options_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ArgumentError, match=message):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_yaml(tmp_path / "nothing.yaml")


def test_numbers_of_yaml_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nema: 9e-1\nepochs: 2\nlogger: csv\n")
    assert read_yaml(tmp_path / "c.yaml") == {
        "lr": 0.001,
        "ema": 0.9,
        "epochs": 2,
        "logger": ("csv",),
    }
    assert yaml.safe_load("lr: 1e-3") == {"lr": "1e-3"}  # why it is asked


# --- numbers that are found ----------------------------------------------------------------------


def test_a_rate_is_found_and_kept(
    data: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_STEPS", 30)
    run = tmp_path / "run"
    status, _, err = here(
        *(*COMMAND, "--data", str(data), "--output", str(run)),
        *("--lr", "auto", "--batch-size", "auto"),
    )
    assert status == 0, err
    found = read_config(run)
    assert 1e-5 < found.lr < 1
    assert f"--lr auto: {found.lr:.3g}" in err
    assert f"--batch-size auto: {found.batch_size}" in err
    assert not list(run.glob(".lr_find*"))


def test_the_largest_batch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose memory ends between 8 and 16 images."""
    settings = settings_of(tree(tmp_path / "data", "a", "b", count=12))
    step = Recipe.training_step

    def full(self: Recipe, batch: Any, index: int) -> Any:
        if len(batch[0]) > 8:
            raise RuntimeError("CUDA out of memory.")
        return step(self, batch, index)

    monkeypatch.setattr(Recipe, "training_step", full)
    prepared = prepare(settings, open_split(settings), "se", 0)
    assert tune.largest_batch(settings, prepared, tmp_path) == 8


def test_several_processes_find_nothing(data: Path, tmp_path: Path) -> None:
    settings = replace(settings_of(data), devices="2")
    with pytest.raises(ArgumentError, match="need a single process"):
        running.start(settings, tmp_path / "run", QUIET, find=frozenset({"lr"}))


# --- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "sgd", "accumulate": 2, "drop_path": 0.3, "sched": "poly", "lr_warmup": 0.5},
        {"ema": 0.9, "mixup": 0.4, "layer_decay": 0.8, "reprob": 0.5, "sampler": "balanced"},
        {"logger": "csv", "early_stop": 1, "color_jitter": 0.4, "limit": 9},
    ],
    ids=["sgd", "ema", "csv"],
)
def test_a_steered_run_goes_on_to_the_same_weights(
    options: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings_of(data), batch_size=4, epochs=2, lr=0.01, **options)
    running.start(settings, tmp_path / "whole", QUIET)
    step = Recipe.training_step

    def stop(self: Recipe, batch: Any, index: int) -> Any:
        if self.current_epoch == 1 and index == 1:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "training_step", stop)
        with pytest.raises(TrainingError, match=r"stopped\. Go on with"):
            running.start(settings, tmp_path / "parts", QUIET)
    running.resume(tmp_path / "parts", QUIET)
    one, two = (
        torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "parts")
    )
    assert one["global_step"] == two["global_step"]
    for name in ("state_dict", "current_model_state"):
        whole, parts = one.get(name, {}), two.get(name, {})
        assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
