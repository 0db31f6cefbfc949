"""Counts that others published: the paper, timm and torchvision."""

import math
from functools import cache
from pathlib import Path

import paper_tables
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model_weights, list_models

from se_inject import Plan, SqueezeExcite, inject_se, plan_se
from se_inject.layers.cost import se_cost
from se_inject.layers.squeeze_excite import bottleneck_width
from se_inject.layers.squeezes import Squeeze
from se_inject.models.names import ParametersOnMeta, load_model
from se_inject.report.count import Count, count_costs, count_model

# Some of its rows are those of other tables.
paper_tables.count = cache(paper_tables.count)
PAGE = Path(__file__).parents[1] / "docs" / "paper.md"


def plan(name: str, **kwargs: object) -> Plan:
    return plan_se(load_model(name, meta=True), **kwargs)


def test_resnet50_adds_what_the_paper_and_timm_add() -> None:
    resnet50 = plan("resnet50", r=16)
    costs = count_costs(resnet50)
    assert len(resnet50.sites) == 16
    assert costs.base.params == 25_557_032
    assert costs.augmented.params == 28_088_024
    assert sorted({site.bottleneck for site in resnet50.sites}) == [16, 32, 64, 128]
    assert costs.base.macs == pytest.approx(4.0892e9, rel=1e-5)
    # The paper's eq. 5 counts weights: (2/r) * sum of N_s * C_s^2.
    weights = 2 / 16 * sum(n * c**2 for n, c in [(3, 256), (4, 512), (6, 1024), (3, 2048)])
    assert resnet50.added.layers == weights == 2_514_944


def test_resnext50_adds_what_timm_adds() -> None:
    costs = count_costs(plan("resnext50_32x4d", r=16))
    assert (costs.base.params, costs.augmented.params) == (25_028_904, 27_559_896)


def test_the_papers_macs_of_v1_resnet50() -> None:
    """Table 2, as 3.86 -> 3.87: v1 has the stage's stride in the first 1x1 convolution."""
    model = load_model("resnet50", meta=True)
    for layer in (model.layer2, model.layer3, model.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    costs = count_costs(plan_se(model))
    assert costs.base.macs / 1e9 == pytest.approx(3.858, abs=5e-4)
    assert costs.augmented.macs / 1e9 == pytest.approx(3.8715, abs=5e-4)


# --- the paper's tables: the networks of examples/paper_tables.py ------------------------------


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_table_1_widths(name: str) -> None:
    assert paper_tables.widths(name) == "[16, 256], [32, 512], [64, 1024], [128, 2048]"


@pytest.mark.parametrize(
    ("squeeze", "which", "macs", "params"),
    [
        ("avg", "base", "3.86", "25.6"),
        ("none", "se", "4.27", "28.1"),
        ("avg", "se", "3.87", "28.1"),
    ],
)
def test_table_16_to_the_printed_digit(squeeze: str, which: str, macs: str, params: str) -> None:
    figures = getattr(paper_tables.count("resnet50", squeeze=squeeze, bias=False), which)
    assert (f"{figures.macs:.2f}", f"{figures.params:.1f}") == (macs, params)


ABLATIONS: list[tuple[dict[str, object], float]] = [
    *(({"r": r}, paper) for r, (_, paper) in paper_tables.RATIOS.items()),
    *(({"include": glob}, paper) for glob, _, paper in paper_tables.STAGES.values()),
    ({"placement": "3x3"}, 25.8),
]


@pytest.mark.parametrize(("options", "paper"), ABLATIONS, ids=str)
def test_tables_10_13_and_15_parameters(options: dict[str, object], paper: float) -> None:
    """Counted with the statistics of the norms, as the paper must have done."""
    ours = paper_tables.count("resnet50", **options, **paper_tables.ABLATION).se.with_statistics
    assert abs(ours - paper) < 0.1
    if options != {"r": 8}:  # 30.64, printed as 30.7
        assert f"{ours:.1f}" == f"{paper:.1f}"


def test_the_page_is_what_its_script_writes() -> None:
    made, kept = (
        "\n".join(page).splitlines() for page in (paper_tables.page(), [PAGE.read_text()])
    )
    versions = next(i for i, line in enumerate(made) if line.startswith("Made by"))
    assert made[:versions] == kept[:versions]
    assert made[versions + 1 :] == kept[versions + 1 :]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
def test_costs_of_a_variant_are_what_is_there(squeeze: Squeeze, bias: bool) -> None:
    se = SqueezeExcite(48, 8, squeeze=squeeze, bias=bias, device="meta")
    cost = se_cost(48, 8, [(7, 5)], squeeze=squeeze, bias=bias)
    with FlopCounterMode(display=False) as counter:
        se(torch.empty(1, 48, 7, 5, device="meta"))
    assert cost.params == sum(p.numel() for p in se.parameters())
    assert 2 * cost.layers == counter.get_total_flops()
    assert cost.squeeze == (0 if squeeze == "none" else 48 * 35)
    assert cost.scale == 48 * 35


def test_divisor_1_gives_the_papers_plain_ratio() -> None:
    widths = {site.channels: site.bottleneck for site in plan("resnet18", divisor=1).sites}
    assert widths == {64: 4, 128: 8, 256: 16, 512: 32}


@pytest.mark.parametrize("r", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("channels", [*range(8, 200, 8), 30, 100, 1000, 2048])
def test_widths_are_timms(channels: int, r: int) -> None:
    from timm.layers import make_divisible

    assert bottleneck_width(channels, r) == make_divisible(channels / r, 8, round_limit=0.0)


def test_the_width_is_never_below_one() -> None:
    assert bottleneck_width(64, 10**6, divisor=1) == 1


def test_ratios_by_stage() -> None:
    sites = plan("resnet50", r={"layer4.*": 32, "*": 16}).sites
    assert {(s.block[:6], s.bottleneck) for s in sites} == {
        ("layer1", 16),
        ("layer2", 32),
        ("layer3", 64),
        ("layer4", 64),
    }


def test_costs_of_a_site_in_closed_form() -> None:
    site = plan("resnet50").sites[0]
    c, rd, space = 256, 16, 56 * 56
    assert (site.block, site.channels, site.bottleneck) == ("layer1.0", c, rd)
    assert site.shape == (c, 56, 56)
    assert site.params == 2 * c * rd + c + rd
    assert site.macs == 2 * c * rd + 2 * c * space


def test_planned_parameters_are_those_inserted() -> None:
    model = torchvision.models.mobilenet_v2()
    before = sum(p.numel() for p in model.parameters())
    planned = plan_se(model).added.params
    assert sum(p.numel() for p in inject_se(model).parameters()) == before + planned


def test_layer_macs_are_what_the_flop_counter_sees() -> None:
    model = load_model("resnet18", meta=True)
    resnet18 = plan_se(model)
    before = count_model(model, resnet18.example).macs
    after = count_model(resnet18.apply(), resnet18.example).macs
    assert after - before == resnet18.added.layers


class Twice(nn.Module):
    """One residual block, called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unit(nn.functional.avg_pool2d(self.unit(x), 2))


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_a_shared_block_is_edited_once_and_each_of_its_calls_costs() -> None:
    model = Twice()
    shared = plan_se(model, example_input=torch.empty(1, 16, 8, 8))
    assert [site.block for site in shared.sites] == ["unit"]
    assert shared.added == se_cost(16, 8, [(8, 8), (4, 4)])
    shared.apply()
    assert sum(1 for name, _ in model.named_modules() if name.endswith(".se")) == 1


def test_macs_are_of_one_image_whatever_the_batch() -> None:
    model = load_model("resnet18", meta=True)
    one, four = (plan_se(model, example_input=torch.empty(n, 3, 96, 96)) for n in (1, 4))
    assert count_costs(one) == count_costs(four)


# --- torchvision publishes parameters and operations of every network --------------------------

TRANSFORMERS = ("vit", "swin", "maxvit")
CNNS = [
    name for name in list_models(module=torchvision.models) if not name.startswith(TRANSFORMERS)
]
# Published without the auxiliary heads (inception_v3's are counted there).
AUXILIARY = {"googlenet": ("aux1", "aux2")}


@pytest.mark.filterwarnings("ignore:The default weight initialization of:FutureWarning")
@pytest.mark.parametrize("name", CNNS)
def test_base_counts_are_those_that_torchvision_publishes(name: str) -> None:
    model = load_model(f"torchvision/{name}", meta=True)
    for head in AUXILIARY.get(name, ()):
        setattr(model, head, None)

    @cache
    def counted(crop: int) -> Count:
        return count_model(model, ((torch.empty(1, 3, crop, crop, device="meta"),), {}))

    for weights in get_model_weights(name):
        count = counted(weights.transforms().crop_size[0])
        assert count.params == weights.meta["num_params"]
        published = weights.meta["_ops"]
        printed = 10.0 ** -len(str(published).partition(".")[2])
        assert math.isclose(count.macs / 1e9, published, rel_tol=0.01, abs_tol=printed)


def test_a_meta_build_fills_nothing_and_a_real_one_beside_it_everything() -> None:
    """Initialisation is skipped where there are no values, and only there."""
    with ParametersOnMeta():
        layer = nn.Linear(3, 2)
        nn.init.trunc_normal_(layer.weight)
        real = torch.zeros(3)
        nn.init.ones_(real).mul_(2).add_(1)
    assert layer.weight.is_meta
    assert isinstance(layer.weight, nn.Parameter)
    assert real.tolist() == [3, 3, 3]


def test_what_torch_refuses_to_fill_is_refused_on_meta() -> None:
    with ParametersOnMeta():
        with pytest.raises(ValueError, match="Fan in and fan out"):
            nn.init.kaiming_uniform_(nn.Parameter(torch.empty(3)))
        with pytest.raises(ValueError, match="uninitialized parameter"):
            nn.init.normal_(nn.LazyLinear(3).weight)
