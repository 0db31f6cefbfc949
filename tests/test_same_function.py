"""Right after injection the model computes what it computed before, to the last bit."""

import copy
import functools
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import first_tensor, open_gates, randomize
from torch import nn

from se_inject import inject_se, plan_se, remove_se

DROP_PATH = {"drop_path_rate": 0.3}
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": DROP_PATH,
    "resnet50": DROP_PATH,
    "resnet50d": DROP_PATH,
    "resnetv2_50": DROP_PATH,
    "resnetaa50": DROP_PATH,
    "regnetx_002": DROP_PATH,
    "mobilenetv2_100": DROP_PATH,
    "mnasnet_100": DROP_PATH,
    "tf_efficientnet_lite0": DROP_PATH,
    "hrnet_w18_small": {},
    "res2net50_26w_4s": DROP_PATH,
    "dla34": {},
    "dpn68": {},
    "xception41": DROP_PATH,
    "inception_resnet_v2": {},
    "nf_resnet50": DROP_PATH,
    "convnext_atto": DROP_PATH,
    "gernet_s": DROP_PATH,
    "cspresnet50": DROP_PATH,
    "mobilenetv4_conv_small": DROP_PATH,
}
TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet50": {},
    "resnext50_32x4d": {},
    "mobilenet_v2": {},
    "mnasnet1_0": {},
    "convnext_tiny": {},  # stochastic depth 0.1 by default
    "regnet_x_400mf": {},
    "deeplabv3_resnet50": {"weights_backbone": None},
}
MODELS = [f"timm/{name}" for name in TIMM] + [f"torchvision/{name}" for name in TORCHVISION]
SIDES = {"inception_resnet_v2": 80}


def build(name: str) -> nn.Module:
    library, _, name = name.partition("/")
    if library == "timm":
        return randomize(timm.create_model(name, **TIMM[name]))
    return randomize(torchvision.models.get_model(name, **TORCHVISION[name]))


@functools.lru_cache(maxsize=1)
def built(name: str) -> nn.Module:
    """For the two dtypes of the next test: to draw the weights takes as long as to run them."""
    return build(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_to_the_bit(name: str, dtype: torch.dtype, device: str) -> None:
    model = copy.deepcopy(built(name)).to(device, dtype)
    state = copy.deepcopy(model.state_dict())
    side = SIDES.get(name.split("/")[1], 64 if device == "cuda" else 32)
    x = torch.randn(2, 3, side, side, device=device).to(dtype)

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        outputs = []
        for training in (False, True):
            model.train(training).load_state_dict(state, strict=False)
            torch.manual_seed(1)  # the same paths are dropped
            outputs.append(first_tensor(model(x)))
        return outputs

    before = run()
    assert inject_se(model) is model
    assert all(output.isfinite().all() for output in before)
    assert all(map(torch.equal, before, run()))
    open_gates(model)
    same = list(map(torch.equal, before, run()))
    assert not any(same), "the SE blocks are not in the path of the output"


@pytest.mark.parametrize(
    ("name", "shape", "layer"),
    [
        ("timm/mambaout_femto", (2, 3, 64, 64), nn.Linear),
        ("timm/caformer_s18", (2, 3, 64, 64), nn.Conv2d),
        ("torchvision/r3d_18", (2, 3, 4, 32, 32), nn.Conv3d),
        ("torchvision/mc3_18", (2, 3, 4, 32, 32), nn.Conv3d),
        ("torchvision/r2plus1d_18", (2, 3, 4, 32, 32), nn.Conv3d),
    ],
)
def test_channels_last_and_video_outputs_are_equal_to_the_bit(
    name: str, shape: tuple[int, ...], layer: type[nn.Module], device: str
) -> None:
    library, _, name = name.partition("/")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    model = randomize(make(name)).to(device).eval()
    x = torch.randn(shape, device=device)
    with torch.no_grad():
        before = model(x)
        plan = plan_se(model, example_input=x)
        assert torch.equal(before, plan.apply()(x))
        assert all(isinstance(model.get_submodule(f"{s.name}.fc1"), layer) for s in plan.sites)
        open_gates(model)
        assert not torch.equal(before, model(x))
        assert torch.equal(before, remove_se(model)(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["timm/resnet18", "timm/convnext_atto", "timm/mobilenetv2_100"])
def test_float16_outputs_are_equal_to_the_bit(name: str, training: bool, device: str) -> None:
    model = build(name).to(device, torch.float16).train(training)
    x = torch.randn(2, 3, 64, 64, device=device, dtype=torch.float16)

    def run() -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return model(x)

    before = run()
    assert before.isfinite().all()
    assert torch.equal(before, (inject_se(model), run())[1])


def test_autocast_outputs_are_equal_to_the_bit(device: str) -> None:
    model = build("timm/resnet18").to(device).eval()
    x = torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        before = model(x)
        assert torch.equal(before, inject_se(model)(x))


def test_drop_path_really_drops_in_these_tests() -> None:
    model = build("timm/resnet18").train()
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("name", "before_tail"),
    [
        ("resnet18", "drop_path"),
        ("convnext_atto", "mul"),  # its layer scale is in the block's own forward
        ("nf_resnet50", "drop_path"),
        ("res2net50_26w_4s", None),
    ],
)
def test_the_se_block_comes_before_stochastic_depth_and_scales(
    name: str, before_tail: str | None, device: str
) -> None:
    model = timm.create_model(name, **(DROP_PATH if before_tail else {})).to(device)
    plan = plan_se(model)
    site = plan.sites[-1]
    (reader,) = site.where[0].readers
    assert site.where[0].fused == (before_tail is None)
    if before_tail is None:
        assert reader is site.where[0].addition
    else:
        assert reader.name.startswith(before_tail)
    assert site.device.type == device


def test_the_base_gets_the_gradients_that_it_got_before(device: str) -> None:
    """With every gate at 1 the base weights learn the same thing in the first step."""
    model = build("timm/resnet18").to(device).eval()
    x = torch.randn(2, 3, 64, 64, device=device)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if ".se." not in n}

    before = gradients()
    inject_se(model)
    after = gradients()
    # The gate's own gradient ends at fc2 = 0, so nothing of it reaches the branch.
    assert all(torch.allclose(before[n], after[n], rtol=1e-4, atol=1e-7) for n in before)
