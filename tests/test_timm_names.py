"""``import se_inject.timm``: injected models by names of timm's registry, and timm's own files."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import open_gates, randomize
from small_net import build
from timm.models import load_checkpoint, save_for_hf
from torch import nn

import se_inject.timm
from se_inject import (
    ArgumentError,
    CheckpointError,
    NoSiteError,
    SqueezeExcite,
    inject_se,
    save_se,
    to_stock,
)
from se_inject.keep.beside import described, repeat
from se_inject.layers.attention import Attention
from se_inject.models.files import load_weights
from se_inject.models.names import load_model, timm_names
from se_inject.report.zoo import model_names
from se_inject.timm import hf_config

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.split(".")[-1] == "se"]


def opened(name: str, **options: object) -> nn.Module:
    model = randomize(timm.create_model(name, **options)).eval()
    open_gates(model)
    return model


def test_every_model_of_timm_has_a_twin() -> None:
    names = [name for name in timm.list_models() if name.startswith("se_inject_")]
    assert names == [f"se_inject_{name}" for name in timm_names()]
    assert len(names) > 1000
    assert timm.list_models("se_inject_resnet18*", module="timm")[0] == "se_inject_resnet18"


def test_the_options_of_inject_se_are_arguments_of_the_model() -> None:
    options = {"r": {"layer4.*": 4, "*": 8}, "placement": "pre", "gate": "tanh", "divisor": 1}
    model = timm.create_model("se_inject_test_resnet", num_classes=7, exclude="layer1.*", **options)
    by_hand = timm.create_model("test_resnet", num_classes=7)
    inject_se(by_hand, exclude="layer1.*", **options)
    assert str(model) == str(by_hand)
    assert (
        timm.create_model("se_inject_test_resnet", in_chans=4)(torch.randn(2, 4, 64, 64))
        .isfinite()
        .all()
    )
    assert timm.create_model("test_resnet").pretrained_cfg["architecture"] == "test_resnet"


def test_another_attention_by_its_name() -> None:
    model = timm.create_model("se_inject_test_resnet", attention="eca")
    assert {type(block.layer).__name__ for block in blocks_of(model)} == {"EcaModule"}
    as_timm_has_it = timm.create_model("se_inject_test_resnet", attention="eca", init="paper")
    assert {type(block).__name__ for block in blocks_of(as_timm_has_it)} == {"EcaModule"}


def test_a_feature_extractor_has_se_blocks_too() -> None:
    model = timm.create_model("se_inject_test_resnet", features_only=True)
    assert len(blocks_of(model)) == 4
    assert [tuple(x.shape) for x in model(X)][-1] == (2, 96, 2, 2)


def test_a_model_that_cannot_take_one_says_why() -> None:
    with pytest.raises(NoSiteError, match="no residual site in VisionTransformer"):
        timm.create_model("se_inject_vit_tiny_patch16_224")
    with pytest.raises(ArgumentError, match="r=0 is not a positive"):
        timm.create_model("se_inject_test_resnet", r=0)


def test_pretrained_weights_are_those_of_the_base(tmp_path: Path) -> None:
    base = randomize(timm.create_model("test_resnet"))
    torch.save(base.state_dict(), tmp_path / "base.pth")
    overlay = {"file": str(tmp_path / "base.pth")}
    model = timm.create_model(
        "se_inject_test_resnet.r160_in1k", pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert torch.equal(model.eval()(X), base.eval()(X))
    assert model.pretrained_cfg["hf_hub_id"] == "timm/test_resnet.r160_in1k"
    assert "se_inject_test_resnet.r160_in1k" in timm.list_pretrained("se_inject_*")


def test_a_folder_of_timm_brings_the_se_blocks_back(tmp_path: Path) -> None:
    model = opened("se_inject_test_resnet", num_classes=5, r=4, gate="tanh")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(X), model(X))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert torch.equal(other.forward_features(X), model.forward_features(X))
    with pytest.raises(ArgumentError, match="build the whole network"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)


def by_hand() -> nn.Module:
    """Two calls with different options, and one block left out."""
    model = randomize(timm.create_model("test_resnet", num_classes=5)).eval()
    inject_se(model, 4, include="layer[12].*", gate="tanh", divisor=1, example_input=X)
    inject_se(model, 8, include="layer4.*", squeeze="max")
    open_gates(model)
    return model


def test_a_folder_of_a_model_that_was_injected_by_hand(tmp_path: Path) -> None:
    model = by_hand()
    save_for_hf(model, str(tmp_path), safe_serialization=True, **hf_config(model))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(X), model(X))
    assert model.pretrained_cfg["architecture"] == "test_resnet"
    with pytest.raises(ArgumentError, match="leave out r, gate"):
        timm.create_model(f"local-dir:{tmp_path}", r=4, gate="relu")


def test_a_model_that_has_no_block_or_is_of_no_library_is_not_described() -> None:
    with pytest.raises(NoSiteError, match="has no SE block"):
        hf_config(timm.create_model("test_resnet"))
    with pytest.raises(ArgumentError, match="is not from timm"):
        hf_config(inject_se(build(), 4))


def test_a_block_of_the_users_own_is_given_again(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet").eval()
    inject_se(model, se_layer=Attention("eca"))
    save_for_hf(model, str(tmp_path), safe_serialization=True, **hf_config(model))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, attention="eca").eval()
    assert torch.equal(again(X), model(X))
    with pytest.raises(CheckpointError, match="another se_layer"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


HOSTILE: dict[str, tuple[Any, str]] = {
    "no plan": ([], "is damaged"),
    "format": ({"format": 99}, "its format is 99"),
    "no sites": ({"sites": []}, "no sites"),
    "sites": ({"sites": {}}, "sites is no list"),
    "example": ({"examples": []}, "the example 0 of 0"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_plan_is_refused(kind: str) -> None:
    changes, message = HOSTILE[kind]
    plan = described(by_hand())
    plan = changes if isinstance(changes, list) else plan | changes
    base = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(CheckpointError, match=message) as caught:
        repeat(base, plan, "the plan")
    assert len(str(caught.value).splitlines()) == 1
    assert not blocks_of(base)


def test_a_plan_with_a_bottleneck_of_gigabytes_builds_nothing() -> None:
    plan = json.loads(json.dumps(described(by_hand())))
    for site in plan["sites"]:
        site["settings"]["divisor"] = site["bottleneck"] = 2**30
    with pytest.raises(CheckpointError, match="cannot have a bottleneck of 1073741824 channels"):
        repeat(timm.create_model("test_resnet", num_classes=5), plan, "the plan")


def test_a_plan_of_another_base_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not fit this base"):
        repeat(timm.create_model("test_convnext"), described(by_hand()), "the plan")


@pytest.mark.parametrize("average", [False, True])
def test_a_checkpoint_of_timms_train_py_loads(average: bool, tmp_path: Path) -> None:
    options = {"r": 4, "num_classes": 5}
    model = opened("se_inject_test_resnet", **options)
    saved = {"arch": "se_inject_test_resnet", "epoch": 0, "args": argparse.Namespace(lr=0.1)}
    plain = model.state_dict()
    saved["state_dict"] = {k: v * 0 for k, v in plain.items()} if average else plain
    if average:
        saved["state_dict_ema"] = plain
    torch.save(saved, tmp_path / "last.pth.tar")
    for load in (load_checkpoint, load_weights):
        again = timm.create_model("se_inject_test_resnet", **options).eval()
        load(again, tmp_path / "last.pth.tar")
        assert torch.equal(again(X), model(X))


def test_our_own_files_know_the_base(tmp_path: Path) -> None:
    model = opened("se_inject_resnet18", num_classes=3)
    assert to_stock(model).pretrained_cfg["architecture"] == "seresnet18"
    save_se(model, f"{tmp_path}/net/")
    assert '"base": "resnet18.' in (tmp_path / "net" / "config.json").read_text()


def test_the_zoo_and_the_names_of_the_command_line_stay_as_they_were() -> None:
    assert not [name for name in model_names("timm") if "se_inject" in name]
    assert blocks_of(load_model("se_inject_test_resnet", meta=True))


SCRIPT = """
import sys
import timm
from timm.utils import ParseKwargs
import argparse
import beside

assert __name__ == "__main__"
parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
args = parser.parse_args()
model = timm.create_model(args.model, **args.model_kwargs)
print([(b.bottleneck, b.gate.name) for b in model.modules() if type(b).__name__ == "SqueezeExcite"])
"""


def test_a_script_of_timm_runs_through_the_module(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "beside.py").write_text("")
    options = ["--model-kwargs", "r=4", "divisor=1", "gate=tanh", "include=layer[12].*"]
    command = ["scripts/train.py", "--model", "se_inject_test_resnet", *options]

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "se_inject.timm", *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=1200,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    ran = run(*command)
    assert ran.returncode == 0, ran.stderr
    model = timm.create_model(
        "se_inject_test_resnet", r=4, divisor=1, gate="tanh", include="layer[12].*"
    )
    expected = [(b.bottleneck, "tanh") for b in model.modules() if isinstance(b, SqueezeExcite)]
    assert ran.stdout.strip() == str(expected)
    missing = run("scripts/none.py")
    assert missing.returncode == 1
    assert "there is no script" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_a_model_registered_later_can_be_registered_too() -> None:
    def later_net(pretrained: bool = False, **kwargs: object) -> nn.Module:
        return timm.create_model("test_resnet", **kwargs)

    later_net.__module__ = __name__
    timm.models.register_model(later_net)
    try:
        assert not timm.is_model("se_inject_later_net")
        se_inject.timm.register(["later_net"])
        assert len(blocks_of(timm.create_model("se_inject_later_net"))) == 4
    finally:
        for name in ("later_net", "se_inject_later_net"):
            timm.models._registry._clear_model_entries(name)
            timm.models._registry._model_entrypoints.pop(name, None)
