"""Against what we did not write: timm's own SE networks, key by key and number by number."""

import pytest
import timm
import torch
from helpers import randomize
from torch import nn

from se_inject import inject_se
from se_inject.models import load_model

# The networks of timm whose SE version differs from them by the standard SE block alone.
PAIRS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet50t",
    "resnet101",
    "resnet152",
    "resnet152d",
    "resnet200d",
    "resnetaa50d",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
]
# A network each for basic blocks, bottlenecks, deep stem with average pooling, anti-aliasing,
# grouped convolutions, and depth: the others differ from these in width alone.
NUMERIC = ["resnet18", "resnet50", "resnet50t", "resnetaa50d", "resnext50_32x4d", "resnet152"]


@pytest.mark.parametrize("name", PAIRS)
def test_keys_and_shapes_are_those_of_timms_se_network(name: str) -> None:
    ours = inject_se(load_model(name, meta=True), init="paper").state_dict()
    timms = load_model(f"se{name}", meta=True).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in timms.items()}


def pair(name: str, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    timms = randomize(timm.create_model(f"se{name}", **kwargs))
    ours = inject_se(timm.create_model(name, **kwargs), init="paper")
    ours.load_state_dict(timms.state_dict(), strict=True)
    return ours, timms


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", PAIRS)
def test_outputs_equal_timms_se_network(name: str, device: str) -> None:
    ours, timms = pair(name)
    x = torch.randn(2, 3, 96, 96, device=device)
    with torch.no_grad():
        a, b = ours.to(device).eval()(x), timms.to(device).eval()(x)
    assert b.std() > 1e-3
    assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("name", NUMERIC)
def test_gradients_in_train_mode_equal_timms_se_network(name: str, device: str) -> None:
    # In float64: in float32, summing in another order (addcmul) alone moves the gradients of the
    # stem of a deep network in train mode by more than the tolerance.
    ours, timms = (model.to(device).double().train() for model in pair(name))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, device=device)
    target = torch.randint(1000, (4,), device=device)
    for model in (ours, timms):
        nn.functional.cross_entropy(model(x), target).backward()
    theirs = dict(timms.named_parameters())
    errors = {
        name: relative_error(p.grad, theirs[name].grad)
        for name, p in ours.named_parameters()
        # A bias in front of a norm in train mode has a gradient of rounding noise alone.
        if theirs[name].grad.norm() > 1e-9
    }
    assert len(errors) > 0.9 * len(theirs)
    assert max(errors.values()) < 1e-5


def test_the_paper_init_draws_both_layers_at_random() -> None:
    model = inject_se(timm.create_model("resnet18"), init="paper")
    assert model.layer1[0].se.fc2.weight.std() > 0
    assert model.layer1[0].se.gate_scale == 1.0
