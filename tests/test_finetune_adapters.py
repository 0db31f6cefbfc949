"""finetune --train head, norm, bias: what SE as an adapter is compared with, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from helpers import randomize
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from se_inject import ArgumentError, TrainingError, inject_se
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.after.page import write_page
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.runs import trainer as running
from se_inject.finetune.training.callbacks import save_network
from se_inject.finetune.training.recipe import Recipe
from se_inject.finetune.training.tune import find_settings

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to begin from: timm's own last norms are zero, which stops what is behind them."""
    pl.seed_everything(0, verbose=False)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(randomize(timm.create_model("test_resnet")).state_dict(), path)
    return path


def settings_for(base: Path, train: Any) -> Settings:
    return Settings(
        "test_resnet", checkpoint=str(base), train=train, epochs=1, img_size=32, workers=0,
        limit=64, lr=1e-2,
    )  # fmt: skip


def trained(base: Path, train: Any, folder: Path) -> set[str]:
    """The names of all tensors, buffers included, that a run made others than the base's."""
    running.start(settings_for(base, train), folder, QUIET)
    before = torch.load(base, weights_only=True)
    after = use.load_run(folder).network.state_dict()
    return {key for key in after if key not in before or not torch.equal(after[key], before[key])}


HEAD = {"fc.weight", "fc.bias"}


def norms_of(network: nn.Module) -> set[str]:
    return {
        f"{name}.{tensor}"
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for tensor in ("weight", "bias")
    }


def test_the_head_alone_learns(base: Path, tmp_path: Path) -> None:
    assert trained(base, "head", tmp_path) == HEAD


def test_the_norms_learn_and_their_statistics_do_not(base: Path, tmp_path: Path) -> None:
    expected = norms_of(timm.create_model("test_resnet"))
    assert len(expected) > 20
    assert trained(base, "norm", tmp_path) == HEAD | expected


def test_the_biases_learn(base: Path, tmp_path: Path) -> None:
    names = dict(timm.create_model("test_resnet").named_parameters())
    expected = {name for name in names if name.endswith(".bias")}
    assert trained(base, "bias", tmp_path) == HEAD | expected


def test_the_se_arm_leaves_the_base_as_it_is(base: Path, tmp_path: Path) -> None:
    moved = trained(base, "se+head", tmp_path)
    assert {key for key in moved if ".se." not in key} == HEAD
    assert any(".se." in key for key in moved)


@pytest.mark.parametrize("train", ["norm", "bias"])
def test_statistics_stay_also_where_they_would_move(train: Any) -> None:
    """--bn-stats moving is of the phase in which all learns; here the base stays as it is."""
    network = timm.create_model("test_resnet", num_classes=10)
    settings = Settings("test_resnet", pretrained=False, train=train, bn_stats="moving")
    recipe = Recipe(network, settings, 10, 0)
    recipe.train()
    assert not network.bn1.training
    assert network.bn1.weight.requires_grad == (train == "norm")
    assert network.bn1.bias.requires_grad
    assert network.fc.training


@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        ("resnet50", True),
        ("hf-hub:timm/resnet50.a1_in1k", True),
        ("local-dir:/some/folder", True),
        ("my_package.nets:build", False),
    ],
)
def test_statistics_of_a_pretrained_base_stay(model: str, frozen: bool) -> None:
    assert Settings(model).statistics_frozen == frozen
    assert not Settings(model, pretrained=False).statistics_frozen


class NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("train", ["norm", "bias"])
def test_a_base_without_such_parameters_is_an_error(train: Any) -> None:
    settings = Settings("x", pretrained=False, train=train)
    with pytest.raises(TrainingError, match=f"--train {train} has nothing to train"):
        Recipe(NoNorm(), settings, 10, 0)
    Recipe(NoNorm(), replace(settings, train="head"), 10, 0)  # the head is there


def test_norms_of_timm_count_as_norms() -> None:
    network = timm.create_model("test_convnext", num_classes=10)
    recipe = Recipe(network, Settings("x", pretrained=False, train="norm"), 10, 0)
    learns = {name for name, p in network.named_parameters() if p.requires_grad}
    assert "stages.0.blocks.0.norm.weight" in learns
    assert "stages.0.blocks.0.conv_dw.weight" not in learns
    assert recipe.new == learns


def test_se_blocks_are_no_part_of_these_arms() -> None:
    """The same call with SE blocks inside: they are new parts, whatever --train says."""
    network = inject_se(
        timm.create_model("test_resnet", num_classes=10), example_input=torch.empty(2, 3, 32, 32)
    )
    recipe = Recipe(network, Settings("x", pretrained=False, train="se+head"), 10, 0)
    assert recipe.new == {n for n in dict(network.named_parameters()) if ".se." in n} | HEAD


def test_a_network_without_se_is_kept_also_when_it_is_channels_last(tmp_path: Path) -> None:
    """As it is on a GPU. safetensors refuses tensors that are not contiguous."""
    network = timm.create_model("test_resnet", num_classes=10)
    network.to(memory_format=torch.channels_last)
    save_network(network, tmp_path / "best.safetensors", base_is_known=True)
    kept = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in network.state_dict().items())


def test_a_control_beside_them_is_refused(base: Path) -> None:
    with pytest.raises(ArgumentError, match="would train the same again"):
        replace(settings_for(base, "head"), control=True).check()


def test_what_comes_after_a_run_knows_that_it_has_no_se(base: Path, tmp_path: Path) -> None:
    settings = replace(settings_for(base, "head"), seeds=2)
    summary = running.start(settings, tmp_path, QUIET)
    assert list(summary["arms"]) == ["control"]
    assert "No arm with SE blocks" in summary["verdict"]
    run = use.load_run(tmp_path)
    assert run.arm == "control"
    arms = [json.loads((tmp_path / f"control-{i}/arm.json").read_text()) for i in (0, 1)]
    best = max(arm["val_acc"] for arm in arms)
    assert use.evaluate(run, tmp_path)["top1"] == pytest.approx(best)
    page = write_page(tmp_path).read_text()
    assert "without SE" in page
    assert "The gates of the SE blocks" not in page


def test_the_rate_is_found_for_what_learns(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from se_inject.finetune.training import tune

    seen: list[frozenset[str]] = []
    original = tune._recipe

    def recipe(*given: Any) -> Recipe:
        found = original(*given)
        seen.append(found.new)
        return found

    monkeypatch.setattr(tune, "_recipe", recipe)
    monkeypatch.setattr(tune, "_STEPS", 40)
    find_settings(settings_for(base, "norm"), frozenset({"lr"}), tmp_path, QUIET)
    assert seen[0] == HEAD | norms_of(timm.create_model("test_resnet"))
