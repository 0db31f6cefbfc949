"""Tools that look into a network with hooks see an SE block as they see timm's."""

import pytest
import timm
import torch
from helpers import randomize
from torch import nn

from se_inject import inject_se

pytestmark = pytest.mark.ecosystem

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """resnet18 with our SE blocks, and timm's own seresnet18 with the same weights.

    timm's block adds the shortcut in place, and changes what a hook on its SE block has kept. The
    reference is given an Identity behind the SE block that copies the map.
    """
    theirs = randomize(timm.create_model("seresnet18", num_classes=5)).eval()
    ours = inject_se(timm.create_model("resnet18", num_classes=5), init="paper", example_input=X)
    ours.load_state_dict(theirs.state_dict())
    for block in theirs.layer4:
        block.drop_path = Copy()
    return ours.eval(), theirs


class Copy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "LayerCAM", "EigenCAM"])
@pytest.mark.parametrize("layer", ["se", "conv2"])
def test_pytorch_grad_cam(pair: tuple[nn.Module, nn.Module], method: str, layer: str) -> None:
    cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    maps = []
    for model in pair:
        target = getattr(model.layer4[1], layer)
        with getattr(cam, method)(model, target_layers=[target]) as explain:
            maps.append(explain(X.clone(), targets=[ClassifierOutputTarget(1)] * 2))
    assert maps[0].std() > 0
    torch.testing.assert_close(*map(torch.from_numpy, maps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", ["se", "se.fc1"])
@pytest.mark.parametrize("method", ["LayerActivation", "LayerGradientXActivation", "LayerGradCam"])
def test_captum(pair: tuple[nn.Module, nn.Module], method: str, layer: str) -> None:
    attr = pytest.importorskip("captum.attr")
    found = []
    for model in pair:
        explain = getattr(attr, method)(model, model.layer4[1].get_submodule(layer))
        target = () if method == "LayerActivation" else (1,)
        found.append(explain.attribute(X.clone(), *target))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_captum_sees_the_gate(pair: tuple[nn.Module, nn.Module]) -> None:
    attr = pytest.importorskip("captum.attr")
    gates = [
        attr.LayerActivation(model, model.layer4[1].se.gate).attribute(X.clone()) for model in pair
    ]
    assert gates[0].shape == (2, 512, 1, 1)
    torch.testing.assert_close(*gates, rtol=1e-5, atol=1e-6)
