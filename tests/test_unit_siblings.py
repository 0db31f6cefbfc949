"""Networks that others built with channel attention: ours is the same, to the last bit."""

from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from timm.layers import EffectiveSEModule
from timm.models.rdnet import RDNet
from timm.models.vovnet import VovNet
from torch import Tensor, nn

from se_inject import inject_se

X = torch.randn(2, 3, 64, 64)
LARGE = torch.randn(1, 3, 224, 224)  # the networks of pytorchcv pool a fixed size


def assert_equal_to(
    stock: nn.Module, base: nn.Module, attention: type[nn.Module], x: Tensor = X
) -> None:
    """``base`` is injected already; its attention gets the weights of the stock network's."""
    randomize(stock).eval()
    theirs = [module for module in stock.modules() if isinstance(module, attention)]
    ours = [module for module in base.modules() if isinstance(module, attention)]
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        b.load_state_dict(a.state_dict())
    # A gate that is a child of a Sequential shifts no key: it stands at its end.
    state = stock.state_dict()
    assert not base.load_state_dict(
        {key: value for key, value in state.items() if key in base.state_dict()}, strict=False
    ).unexpected_keys
    with torch.no_grad():
        assert torch.equal(base.eval()(x), stock(x))


def test_rdnets_blocks_with_ese() -> None:
    def build(block: str) -> RDNet:
        torch.manual_seed(0)
        return RDNet(
            num_classes=10,
            growth_rates=(16, 24, 32, 32),
            num_blocks_list=(2, 2, 2, 2),
            block_type=(block,) * 4,
            is_downsample_block=(None, True, True, True),
            num_init_features=16,
            ls_init_value=0.5,
        )

    base = inject_se(build("Block"), se_layer=EffectiveSEModule)
    assert_equal_to(build("BlockESE"), base, EffectiveSEModule)


@pytest.mark.parametrize("depth", [(1, 1, 1, 1), (1, 1, 2, 2), (2, 1, 3, 1)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_vovnets_with_ese(depth: tuple[int, ...], depthwise: bool) -> None:
    def build(attn: str) -> VovNet:
        torch.manual_seed(0)
        cfg = {
            "stem_chs": [16, 16, 32],
            "stage_conv_chs": [32, 32, 40, 48],
            "stage_out_chs": [32, 40, 48, 56],
            "layer_per_block": 3,
            "block_per_stage": list(depth),
            "residual": False,
            "depthwise": depthwise,
            "attn": attn,
        }
        return VovNet(cfg, num_classes=10)

    # timm gates the last block of each stage only.
    last = [f"stages.{stage}.blocks.{blocks - 1}" for stage, blocks in enumerate(depth)]
    base = inject_se(build(""), include=last, se_layer=EffectiveSEModule)
    assert_equal_to(build("ese"), base, EffectiveSEModule)


@pytest.mark.third_party
@pytest.mark.parametrize("version", ["shufflenetv2", "shufflenetv2b"])
def test_pytorchcvs_shufflenets_with_se(version: str) -> None:
    common = pytest.importorskip("pytorchcv.models.common.att")
    models = pytest.importorskip(f"pytorchcv.models.{version}")
    networks: dict[str, Callable[..., nn.Module]] = {
        "shufflenetv2": getattr(models, "ShuffleNetV2", None),
        "shufflenetv2b": getattr(models, "ShuffleNetV2b", None),
    }

    def build(use_se: bool) -> nn.Module:
        torch.manual_seed(0)
        return networks[version](
            channels=[[48] * 4, [96] * 8, [192] * 4],
            init_block_channels=24,
            final_block_channels=64,
            use_se=use_se,
            in_size=(224, 224),
            num_classes=10,
        )

    base = inject_se(
        build(False),
        example_input=LARGE,
        se_layer=lambda channels: common.SEBlock(channels=channels),
    )
    assert_equal_to(build(True), base, common.SEBlock, LARGE)
