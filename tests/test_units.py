"""Networks without residual additions: where the SE blocks go, and that nothing else changes."""

from collections import Counter

import pytest

from se_inject import plan_se
from se_inject.models.names import load_model
from se_inject.reasons import Reason

# Sites, least and most channels, added parameters (r=16, divisor 8, biases), gated units.
DEFAULTS = {
    "torchvision/vgg16_bn": (13, 64, 512, 231_824, 0),
    "torchvision/alexnet": (5, 64, 384, 43_216, 0),
    "mobilenetv1_100": (14, 32, 1024, 487_136, 0),
    "lcnet_100": (12, 16, 256, 58_176, 2),
    "repvgg_b0": (28, 64, 1280, 360_168, 0),
    "mobileone_s1": (22, 64, 1280, 594_472, 0),
    "torchvision/squeezenet1_1": (8, 128, 512, 125_600, 0),
    "torchvision/googlenet": (9, 256, 1024, 494_288, 0),
    "inception_v3": (11, 256, 2048, 1_659_312, 0),
    "inception_v4": (19, 96, 1536, 2_333_160, 0),
    "densenet121": (58, 32, 32, 32_016, 0),
    "rdnet_tiny": (6, 64, 104, 8_616, 15),
    "torchvision/shufflenet_v2_x1_0": (16, 58, 232, 50_504, 0),
    "selecsls60": (9, 64, 416, 66_136, 0),
    "vovnet39a": (6, 256, 1024, 455_184, 0),
}


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_table_of_defaults(name: str) -> None:
    plan = plan_se(load_model(name, meta=True))
    channels = [site.channels for site in plan.sites]
    gated = sum(entry.reason == Reason.UNIT_GATED for entry in plan.skipped)
    found = (len(channels), min(channels), max(channels), plan.added.params, gated)
    assert found == DEFAULTS[name]
    assert {site.kind for site in plan.sites} == {"unit"}


@pytest.mark.parametrize(
    ("name", "residual", "units", "params"),
    [
        ("inception_resnet_v2", 40, 3, 9_368_784),
        ("pnasnet5large", 0, 14, 12_379_546),
        ("nasnetalarge", 0, 23, 17_466_836),
        ("resnet18", 8, 0, None),
        ("ghostnet_100", 9, 0, None),
    ],
)
def test_units_beside_residual_branches(
    name: str, residual: int, units: int, params: int | None
) -> None:
    plan = plan_se(load_model(name, meta=True), where="units")
    kinds = Counter(site.kind for site in plan.sites)
    assert (kinds["residual"], kinds["unit"]) == (residual, units)
    assert params in (None, plan.added.params)
