"""Real ImageNet weights on real photographs, both from packages: see ``examples/lite0.py``."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
from lite0 import PHOTOGRAPHS, photographs, pretrained_lite0
from torch import Tensor, nn

from se_inject import inject_se, remove_se, se_parameters


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    return pretrained_lite0()


@pytest.fixture
def model(pretrained: nn.Module, device: str) -> nn.Module:
    import copy

    return copy.deepcopy(pretrained).to(device)


@pytest.fixture
def images(pretrained: nn.Module, device: str) -> Tensor:
    return photographs(pretrained).to(device)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def test_the_photographs_keep_their_class_and_logits_to_the_bit(
    model: nn.Module, images: Tensor
) -> None:
    before = logits(model, images)
    for row, classes in zip(before, PHOTOGRAPHS.values(), strict=True):
        assert int(row.argmax()) in classes
    assert torch.equal(before, logits(inject_se(model), images))
    assert torch.equal(before, logits(remove_se(model), images))


def test_ten_steps_lower_the_loss_move_the_gates_and_nothing_frozen(
    model: nn.Module, images: Tensor
) -> None:
    labels = logits(model, images).argmax(1).repeat(2)
    inject_se(model).requires_grad_(False)
    for p in se_parameters(model):
        p.requires_grad_(True)
    added = {id(p) for p in se_parameters(model)}
    frozen = {
        name: tensor.clone()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in added
    }
    halves = 0.5 * torch.cat([images[..., :112], images[..., 112:]])
    optimizer = torch.optim.AdamW(se_parameters(model), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(halves), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for module in model.modules():
        if hasattr(module, "se_inject"):
            assert module.se_inject.fc2.weight.abs().max() > 0
    state = model.state_dict()
    assert len(frozen) > 200
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())


def test_timms_own_pretrained_path(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """``pretrained=True`` from a file, as from the hub, and then the injection."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "lite0.safetensors")
    again = timm.create_model(
        "tf_efficientnet_lite0",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "lite0.safetensors")},
    )
    again.eval().to(images.device)
    assert torch.equal(logits(model, images), logits(inject_se(again), images))


@pytest.mark.parametrize("name", ["quickstart.py", "own_network.py"])
def test_the_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings are errors here too."""
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / name), run_name="__main__")
    said = capsys.readouterr()
    assert "equal to the last bit: True" in said.out
    assert said.err == ""
