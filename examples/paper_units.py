"""Counts the networks of the paper's Tables 2 and 3 that are not all residual, in two ways.

The paper does not say which parts of an SE block it counts, so there are two counts: "s" has its
layers and the scale, and "ss" has its layers, the squeeze and the scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
from bn_inception import BNInception
from shufflenet import ShuffleNet
from torch import nn

from se_inject import plan_se
from se_inject.models.names import load_model
from se_inject.report.count import count_costs


@dataclass(frozen=True)
class UnitCount:
    """What a network has without and with SE blocks. MACs are for one image of 224 pixels."""

    sites: int
    params: tuple[int, int]  # without and with SE blocks
    base: int  # MACs without SE blocks
    s: int  # MACs with their layers and the scale
    ss: int  # MACs with the squeeze too


def count_units(model: nn.Module, **options: Any) -> UnitCount:
    """Count what ``inject_se(model, divisor=1, bias=False, **options)`` adds."""
    example = torch.empty(1, 3, 224, 224)
    plan = plan_se(model, divisor=1, bias=False, example_input=example, **options)
    costs = count_costs(plan)
    assert costs.base.macs is not None
    ss = costs.base.macs + plan.added.macs
    return UnitCount(
        len(plan.sites),
        (costs.base.params, costs.augmented.params),
        costs.base.macs,
        ss - plan.added.squeeze,
        ss,
    )


def rows_of_table_2() -> list[tuple[str, ...]]:
    """The rows of Table 2, in GMACs."""
    vgg = load_model("torchvision/vgg16_bn", meta=True)
    counted = {
        ("VGG-16 (BN)", "15.47 → 15.48", "27.02/8.81 → 25.22/7.70"): count_units(vgg),
        ("BN-Inception", "2.03 → 2.04", "25.38/7.89 → 24.23/7.14"): count_units(BNInception()),
    }
    return [
        (
            name,
            str(count.sites),
            paper,
            f"{count.base / 1e9:.4f}",
            f"{count.s / 1e9:.4f}",
            f"{count.ss / 1e9:.4f}",
            errors,
        )
        for (name, paper, errors), count in counted.items()
    ]


def rows_of_table_3() -> list[tuple[str, ...]]:
    """The rows of Table 3, in millions of parameters and of MACs."""
    mobilenet = load_model("mobilenetv1_100", meta=True)
    counted = {
        ("MobileNet", "4.2 → 4.7", "569 → 572"): count_units(mobilenet, exclude="bn1"),
        ("MobileNet with its stem", "4.2 → 4.7", "569 → 572"): count_units(mobilenet),
        ("ShuffleNet 1x, g=3", "1.8 → 2.4", "140 → 142"): count_units(ShuffleNet(), where="units"),
    }
    return [
        (
            name,
            str(count.sites),
            params,
            " → ".join(f"{value / 1e6:.3f}" for value in count.params),
            macs,
            f"{count.base / 1e6:.2f}",
            f"{count.s / 1e6:.2f}",
            f"{count.ss / 1e6:.2f}",
        )
        for (name, params, macs), count in counted.items()
    ]
