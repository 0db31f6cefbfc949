"""Networks of other libraries, at random weights: the sites are those that a reader of them expects.

    pip install -e '.[dev,third-party]' && pytest -m third_party

Nothing is downloaded. ``blocks`` are written by hand from the sources of each library: which blocks
have a residual branch with a convolution and no gate. Then the gates are shut, and what is left of
each block must be its shortcut.
"""

import fnmatch
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

from se_inject import NoSiteError, inject_se, plan_se, remove_se

pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]


# What the libraries call the convolutions of a shortcut.
SHORTCUT = r"identity_(conv|block)|shortcut|downsample|skip_connection|\.residual\.|project_conv"


@dataclass(frozen=True)
class Case:
    library: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    blocks: tuple[str, ...]  # globs; each must match, and together they match all sites
    count: int  # of the sites
    shortcut: str = SHORTCUT


def image(channels: int = 3, size: int = 64) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


def pixels(size: int = 64) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def cv(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from pytorchcv.model_provider import get_model

        return get_model(name, pretrained=False, **options)

    return build


def of(module: str, name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(module), name)(*args, **options)


def hf(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        return getattr(transformers, f"{name}Model")(
            getattr(transformers, f"{name}Config")(**config)
        )

    return build


def depth(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        return getattr(transformers, f"{name}ForDepthEstimation")(
            getattr(transformers, f"{name}Config")(**config)
        )

    return build


def upernet() -> nn.Module:
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=16
    )
    return UperNetForSemanticSegmentation(config)


# The units of each: read from pytorchcv's source; 0 where each branch has a gate of its own.
PYTORCHCV = {
    "preresnet10": 4, "preresnet18": 8, "preresnetbc14b": 4, "resnet10": 4, "resnet18": 8,
    "resnetbc14b": 4, "resnext14_16x4d": 4, "seresnet10": 0, "sepreresnet10": 0, "resneta10": 4,
    "resnetd50b": 16, "regnetx002": 13, "regnety002": 0, "senet16": 0,
    "mobilenetv2_wd4": 10, "igcv3_wd4": 25,
    "darknet53": 23, "ibn_resnet50": 16, "ibnb_resnet50": 16, "bagnet9": 16, "bam_resnet18": 8,
    "cbam_resnet18": 0, "dla34": 12, "drnd22": 8, "fbnet_cb": 15, "ghostnet": 9,
    "mnasnet_b1": 10, "mixnet_s": 2, "mobilenetv3_small_w1": 1, "spnasnet": 14, "resnesta18": 0,
    "sharesnet18": 8, "scnet50": 16, "erfnet_cityscapes": 17, "sknet50": 0, "tresnet_m": 3,
}  # fmt: skip
PYTORCHCV_CIFAR = {
    "preresnet20_cifar10": 9, "preresnet56_cifar10": 27, "wrn16_10_cifar10": 6,
    "wrn28_10_cifar10": 12, "resnet20_cifar10": 9, "resnet56_cifar10": 27,
    "diapreresnet20_cifar10": 0, "diaresnet20_cifar10": 0, "seresnet20_cifar10": 0,
    "sepreresnet20_cifar10": 0, "resnext29_32x4d_cifar10": 9, "pyramidnet110_a48_cifar10": 54,
    "ror3_56_cifar10": 28, "shakeshakeresnet20_2x16d_cifar10": 0,
}  # fmt: skip

SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16}
CASES: dict[str, Case] = {
    **{n: Case("pytorchcv", cv(n), image(size=224), (), k) for n, k in PYTORCHCV.items()},
    **{n: Case("pytorchcv", cv(n), image(size=32), (), k) for n, k in PYTORCHCV_CIFAR.items()},
    # The other half of DPN's branch is concatenated, so all of it learns.
    "dpn68": Case("pytorchcv", cv("dpn68"), image(size=224), (), 22, "."),
    "transformers ResNet": Case(
        "transformers",
        hf("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"),
        pixels(), ("encoder.stages.*.layers.*",), 4,
    ),
    "transformers RegNet X": Case(
        "transformers",
        hf("RegNet", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], groups_width=8, layer_type="x"),
        pixels(), ("encoder.stages.*.layers.*",), 4,
    ),
    "transformers RegNet Y": Case(
        "transformers",
        hf("RegNet", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], groups_width=8, layer_type="y"),
        pixels(), (), 0,
    ),
    "transformers ConvNext": Case(
        "transformers", hf("ConvNext", hidden_sizes=[16, 32, 32, 32], depths=[2, 2, 1, 1]),
        pixels(), ("encoder.stages.*.layers.*",), 6,
    ),
    "transformers MobileNetV2": Case(
        "transformers", hf("MobileNetV2", image_size=64, depth_multiplier=0.5), pixels(), ("layer.*",), 10,
    ),
    "transformers EfficientNet": Case(
        "transformers", hf("EfficientNet", image_size=64, hidden_dim=1280), pixels(), (), 0,
    ),
    "transformers Bit": Case(
        "transformers", hf("Bit", embedding_size=32, hidden_sizes=[128, 256], depths=[2, 2]),
        pixels(), ("encoder.stages.*.layers.*",), 4,
    ),
    "transformers DPT": Case(
        "transformers",
        depth("DPT", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
              image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 16, 16],
              fusion_hidden_size=16),
        pixels(32), ("neck.fusion_stage.layers.*.residual_layer?",), 7,
    ),
    "transformers UperNet": Case("transformers", upernet, pixels(), ("backbone.encoder.stages.*.layers.*",), 4),
    "smp Unet": Case(
        "segmentation_models_pytorch", of("segmentation_models_pytorch", "Unet", "resnet18", encoder_weights=None),
        image(), ("encoder.layer*",), 8,
    ),
    "smp DeepLabV3+": Case(
        "segmentation_models_pytorch",
        of("segmentation_models_pytorch", "DeepLabV3Plus", "resnet18", encoder_weights=None),
        image(), ("encoder.layer*",), 8,
    ),
    "smp FPN": Case(
        "segmentation_models_pytorch", of("segmentation_models_pytorch", "FPN", "resnet18", encoder_weights=None),
        image(), ("encoder.layer*",), 8,
    ),
    "monai UNet": Case(
        "monai", of("monai.networks.nets", "UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2),
        image(1, 32), ("model*",), 5,
    ),
    "monai UNet, one subunit": Case(
        "monai", of("monai.networks.nets", "UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=1),
        image(1, 32), ("model*",), 5,
    ),
    "monai SegResNet": Case(
        "monai", of("monai.networks.nets", "SegResNet", 2, 8),
        image(1, 32), ("down_layers.*", "up_layers.*"), 12,
    ),
    "monai ResNet B": Case(
        "monai", of("monai.networks.nets", "resnet10", spatial_dims=2, n_input_channels=3, shortcut_type="B"),
        image(), ("layer*",), 4,
    ),
    "monai ResNet A": Case(
        "monai", of("monai.networks.nets", "resnet10", spatial_dims=2, n_input_channels=3, shortcut_type="A"),
        image(), ("layer*",), 4,
    ),
    "monai DynUNet": Case(
        "monai", of("monai.networks.nets", "DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], res_block=True),
        image(1, 32), ("input_block", "downsamples.0", "bottleneck"), 3, "conv3",
    ),
    "monai DiffusionModelUNet": Case(
        "monai",
        of("monai.networks.nets", "DiffusionModelUNet", 2, 1, 1, channels=(8, 16), num_res_blocks=1,
           attention_levels=(False, False), norm_num_groups=4),
        lambda: (torch.randn(2, 1, 16, 16), torch.zeros(2, dtype=torch.long)),
        ("down_blocks.*", "middle_block.resnet_*", "up_blocks.*"), 8,
    ),
    "diffusers UNet2DModel": Case(
        "diffusers",
        of("diffusers", "UNet2DModel", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
           attention_head_dim=8, **SMALL),
        lambda: {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(1)},
        ("down_blocks.*", "mid_block.resnets.*", "up_blocks.*"), 8,
    ),
    "diffusers UNet2DModel, scale and shift": Case(
        "diffusers",
        of("diffusers", "UNet2DModel", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
           attention_head_dim=8, resnet_time_scale_shift="scale_shift", **SMALL),
        lambda: {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(1)},
        ("down_blocks.*", "mid_block.resnets.*", "up_blocks.*"), 8,
    ),
    "diffusers UNet2DConditionModel": Case(
        "diffusers",
        of("diffusers", "UNet2DConditionModel", down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
           up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=8, **SMALL),
        lambda: {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor(1),
                 "encoder_hidden_states": torch.randn(2, 5, 16)},
        ("down_blocks.*.resnets.*", "mid_block.resnets.*", "up_blocks.*.resnets.*"), 8,
    ),
    "diffusers AutoencoderKL": Case(
        "diffusers",
        of("diffusers", "AutoencoderKL", block_out_channels=(32, 64), layers_per_block=1,
           down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        image(3, 32), ("encoder.*", "decoder.*"), 10,
    ),
    "ultralytics YOLOv8": Case(
        "ultralytics", of("ultralytics.nn.tasks", "DetectionModel", "yolov8n.yaml", verbose=False),
        image(), ("model.*.m.*",), 6,
    ),
}  # fmt: skip


def call(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that the forward returns, with the same random numbers each time."""
    torch.manual_seed(0)
    if isinstance(example, dict):
        output = model(**example)
    else:
        output = model(*example) if isinstance(example, tuple) else model(example)
    return list(tensors(output))


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict) or hasattr(output, "items"):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)
    elif hasattr(output, "sample"):
        yield from tensors(output.sample)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", CASES)
def test_the_sites_are_those_expected_and_the_function_is_kept(name: str) -> None:
    case = CASES[name]
    pytest.importorskip(case.library)
    torch.manual_seed(0)
    model, example = randomize(case.build()).eval(), case.example()
    for parameter in model.parameters():
        if not parameter.any():  # diffusion models begin with a last convolution of zeros
            nn.init.normal_(parameter, std=0.1)
    try:
        plan: Any = plan_se(model, example_input=example)
        blocks = [site.block for site in plan.sites]
    except NoSiteError:
        blocks = []
    assert len(blocks) == case.count
    assert not case.blocks or all(any(fnmatch.fnmatch(b, g) for g in case.blocks) for b in blocks)
    assert all(any(fnmatch.fnmatch(b, glob) for b in blocks) for glob in case.blocks)
    if not blocks:
        return

    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        in_eval, in_train = call(model, example), call(model.train(), example)
        model.load_state_dict(state)
        plan.apply()
        assert equal(call(model.train(), example), in_train)
        model.load_state_dict(state, strict=False)
        assert equal(call(model.eval(), example), in_eval)
    sum(t.float().square().mean() for t in call(model, example) if t.requires_grad).backward()
    idle = [n for n, p in model.named_parameters() if ".se" in n and "fc2" in n and p.grad is None]
    assert not idle
    assert_gates_scale_the_branch(model, plan, example)
    assert_only_shortcuts_learn(model, plan, example, case.shortcut)
    remove_se(model)
    with torch.no_grad():
        assert equal(call(model, example), in_eval)
    assert list(model.state_dict()) == list(state)


@torch.no_grad()
def assert_gates_scale_the_branch(model: nn.Module, plan: Any, example: Any) -> None:
    """With its gate shut, an SE block gives nothing of the branch. (Hooks see branch x gate.)"""
    for site in plan.sites:
        model.get_submodule(site.name).fc2.bias.fill_(-1e4)
    left: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            left.setdefault(name, (args[0].clone(), out.clone()))

        return hook

    hooks = [
        model.get_submodule(site.name).register_forward_hook(keep(site.name)) for site in plan.sites
    ]
    call(model, example)
    for hook in hooks:
        hook.remove()
    for site in plan.sites:
        if site.name not in left:
            continue  # runs in train mode only
        branch, out = left[site.name]
        assert branch.any(), site.name
        assert not out.any(), site.name


def assert_only_shortcuts_learn(model: nn.Module, plan: Any, example: Any, shortcut: str) -> None:
    """With all gates shut, gradients reach the shortcuts' convolutions and no others in a block."""
    model.zero_grad(set_to_none=True)
    sum(t.float().square().mean() for t in call(model, example) if t.requires_grad).backward()
    blocks = list(dict.fromkeys(site.block for site in plan.sites))
    for block in blocks:
        own = model.get_submodule(block)
        for name, parameter in own.named_parameters():
            inner = any(b != block and f"{block}.{name}".startswith(f"{b}.") for b in blocks)
            if inner or parameter.ndim < 3 or ".se." in f".{name}":
                continue
            learns = parameter.grad is not None and bool(parameter.grad.any())
            assert learns == bool(re.search(shortcut, f".{name}")), f"{block}: {name}"


PRE_ACTIVATED = ["preresnet20_cifar10", "wrn16_10_cifar10"]


@pytest.mark.parametrize("name", PRE_ACTIVATED)
def test_pre_activated_units_keep_their_projected_shortcut(name: str) -> None:
    """``identity_conv`` of the pre-activated input is the shortcut: it is what shut gates leave."""
    pytest.importorskip("pytorchcv")
    model, x = randomize(cv(name)()).eval(), torch.randn(1, 3, 32, 32)
    inject_se(model, example_input=x)
    unit = model.features.stage2.unit1
    with torch.no_grad():
        unit.se.fc2.bias.fill_(-1e4)
        y = model.features.stage1(model.features.init_block(x))
        _, given = unit.body(y)
        torch.testing.assert_close(unit(y), unit.identity_conv(given))
