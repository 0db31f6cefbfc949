"""Against what we did not write: timm's own SE networks, key by key and number by number."""

import overhead
import pytest
import timm
import torch
from helpers import randomize
from torch import nn

from se_inject import inject_se
from se_inject.models.names import load_model

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
# Shallow enough that float32 shows the same: summing in another order (addcmul) moves the gradients
# of the stem of a deep network in train mode by more than 1e-5.
# Rounding grows with depth, and how much it is depends on the processor.
SHALLOW = {"resnet18": 1e-5, "resnet34": 3e-5}


@pytest.mark.parametrize("name", PAIRS)
def test_keys_and_shapes_are_those_of_timms_se_network(name: str) -> None:
    ours = inject_se(load_model(name, meta=True), init="paper").state_dict()
    timms = load_model(f"se{name}", meta=True).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in timms.items()}


def pair(name: str, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    timms = randomize(timm.create_model(f"se{name}", **kwargs))
    with torch.device("meta"):  # to draw weights that are not used would take as long again
        base = timm.create_model(name, **kwargs)
    ours = inject_se(base, init="paper")
    weights = {key: tensor.clone() for key, tensor in timms.state_dict().items()}
    ours.load_state_dict(weights, strict=True, assign=True)
    return ours, timms


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", PAIRS)
def test_outputs_equal_timms_se_network(name: str, device: str) -> None:
    ours, timms = pair(name)
    x = torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad():
        a, b = ours.to(device).eval()(x), timms.to(device).eval()(x)
    assert b.std() > 1e-3
    assert relative_error(a, b) < 1e-6


def gradient_errors(
    name: str, dtype: torch.dtype, device: str, **kwargs: object
) -> dict[str, float]:
    ours, timms = (model.to(device, dtype).train() for model in pair(name, **kwargs))
    x = torch.randn(2, 3, 64, 64, dtype=dtype, device=device)
    target = torch.randint(1000, (2,), device=device)
    for model in (ours, timms):
        nn.functional.cross_entropy(model(x), target).backward()
    theirs = {name: p.grad for name, p in timms.named_parameters()}
    # A bias in front of a norm in train mode has a gradient of rounding noise alone.
    errors = {
        name: relative_error(p.grad, theirs[name])
        for name, p in ours.named_parameters()
        if theirs[name].norm() > 1e-9
    }
    assert len(errors) > 0.9 * len(theirs)
    return errors


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_in_train_mode_equal_timms_se_network(name: str, device: str) -> None:
    """Two blocks a stage: one that has a projection, and one that has none."""
    errors = gradient_errors(name, torch.float64, device, layers=(2, 2, 2, 2))
    assert max(errors.values()) < 1e-9


@pytest.mark.parametrize("name", SHALLOW)
def test_gradients_in_float32_equal_timms_se_network(name: str, device: str) -> None:
    # Without ReLU: where rounding takes an input of one across 0, as it does on some processors,
    # the gradients before it are others.
    errors = gradient_errors(name, torch.float32, device, act_layer=nn.SiLU)
    assert max(errors.values()) < SHALLOW[name]


def test_the_paper_init_draws_both_layers_at_random() -> None:
    model = inject_se(timm.create_model("resnet18"), init="paper")
    assert model.layer1[0].se.fc2.weight.std() > 0
    assert model.layer1[0].se.gate_scale == 1.0


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_peak_memory_of_a_step_is_not_above_timms(name: str, mode: str) -> None:
    setting = overhead.Setting(name, mode, batch=4, layout="nchw", device="cpu", side=96)

    def peak(arm: str) -> int:
        step = overhead.make_step(overhead.ARMS[arm], setting)
        step()  # the first makes the momenta
        return overhead.peak_bytes(step, "cpu")

    assert 0 < peak("se_inject") <= peak("timm")
