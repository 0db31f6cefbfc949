"""Writes the tables of the SE paper, beside the networks that our options build.

    python examples/paper_tables.py [docs/paper.md]

Every network is built without weights and counted on meta tensors, for one image of 224 pixels. The
ResNets and ResNeXts are timm's. ``v1`` moves the stride of each stage from the 3x3 convolution to
the 1x1 convolution before it, where the paper's ResNets have it. The errors are the paper's, and
nothing is trained here.

The paper's figures are from Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507 (journal
version), whose numbers of the tables are used here.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from paper_units import rows_of_table_2, rows_of_table_3
from torch import nn

from se_inject import plan_se
from se_inject.models.names import load_model
from se_inject.report.count import Costs, count_costs

# The paper's ablations have layers without biases, and bottlenecks of exactly C/r.
ABLATION: dict[str, Any] = {"bias": False, "divisor": 1}


def v1(model: nn.Module) -> nn.Module:
    """Move the stride of each stage into the first convolution of its first block."""
    for layer in (model.layer2, model.layer3, model.layer4):
        block: Any = layer[0]
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    return model


@dataclass(frozen=True)
class Figures:
    """The figures of one network."""

    params: float  # in millions; what can be trained
    with_statistics: float  # in millions; also the mean and variance of each BatchNorm channel
    macs: float  # in billions


@dataclass(frozen=True)
class Counted:
    """The figures of a network as it is, and with SE blocks."""

    base: Figures
    se: Figures


@cache
def _base(name: str, strided_first: bool) -> nn.Module:
    model = load_model(name, meta=True)
    return v1(model) if strided_first else model


def count(name: str, *, strided_first: bool = True, **options: Any) -> Counted:
    """Count one of timm's networks as it is, and after ``inject_se(model, **options)``."""
    model = _base(name, strided_first)
    costs: Costs = count_costs(plan_se(model, **options, example_input=torch.empty(1, 3, 224, 224)))
    statistics = sum(b.numel() for b in model.buffers() if b.dim())

    def figures(counted: Any) -> Figures:
        params = counted.params
        return Figures(params / 1e6, (params + statistics) / 1e6, counted.macs / 1e9)

    return Counted(figures(costs.base), figures(costs.augmented))


def signed(value: float, digits: int) -> str:
    """Write a number with its sign, unless it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def widths(name: str) -> str:
    """The widths of the two layers, as Table 1 has them, stage by stage."""
    sites = plan_se(_base(name, True), **ABLATION).sites
    pairs = dict.fromkeys((site.bottleneck, site.channels) for site in sites)
    return ", ".join(f"[{rd}, {c}]" for rd, c in pairs)


# --- one function for each table, with its title, its columns, its rows and a remark -------------

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    title: str
    columns: Row
    rows: Sequence[Row]
    remark: str


def table_1() -> Table:
    paper = "[16, 256], [32, 512], [64, 1024], [128, 2048]"
    networks = {"SE-ResNet-50": "resnet50", "SE-ResNeXt-50 (32×4d)": "resnext50_32x4d"}
    rows = []
    for label, name in networks.items():
        ours = widths(name)
        rows.append((label, paper, ours, "none" if ours == paper else "differs"))
    return Table(
        "Table 1: widths of the two layers, stage by stage",
        ("network", "paper [C/r, C]", "ours", "difference"),
        rows,
        "The SE blocks are those of `inject_se(model, r=16)`.",
    )


TABLE_2 = {
    "ResNet-50": ("resnet50", 3.86, 3.87, "24.80/7.48", "23.29/6.62"),
    "ResNet-101": ("resnet101", 7.58, 7.60, "23.17/6.52", "22.38/6.07"),
    "ResNet-152": ("resnet152", 11.30, 11.32, "22.42/6.34", "21.57/5.73"),
    "ResNeXt-50 (32×4d)": ("resnext50_32x4d", 4.24, 4.25, "22.11/5.90", "21.10/5.49"),
    "ResNeXt-101 (32×4d)": ("resnext101_32x4d", 7.99, 8.00, "21.18/5.57", "20.70/5.01"),
}


def table_2() -> Table:
    rows = []
    for label, (name, base, se, base_error, se_error) in TABLE_2.items():
        # ResNeXt has no v1, because its stride has always been in the grouped 3x3 convolution.
        counted = count(name, strided_first=name.startswith("resnet"), **ABLATION)
        ours, with_se = counted.base.macs, counted.se.macs
        rows.append(
            (
                label,
                f"{base:.2f} → {se:.2f}",
                f"{ours:.3f} → {with_se:.3f}",
                f"{signed(ours - base, 3)}, {signed(with_se - se, 3)}",
                f"+{se - base:.2f}",
                f"+{with_se - ours:.3f}",
                f"{base_error} → {se_error}",
            )
        )
    return Table(
        "Table 2: GMACs (the paper's GFLOPs)",
        (
            "network",
            "paper",
            "ours",
            "difference",
            "SE adds, paper",
            "SE adds, ours",
            "the paper's top-1/top-5 errors in %",
        ),
        rows,
        "The ResNets are in v1 form. The convolutions and the classifier are counted, and the"
        " layers, the squeeze and the scale of each SE block. No norm, pooling, activation or"
        " addition of the base is counted. The authors do not say what else they counted in the"
        " deeper networks. This table has only the ResNets and ResNeXts of the paper's.",
    )


RATIOS = {
    2: ("22.29/6.00", 45.7),
    4: ("22.25/6.09", 35.7),
    8: ("22.26/5.99", 30.7),
    16: ("22.28/6.03", 28.1),
    32: ("22.72/6.20", 26.9),
}
STAGES = {
    "stage 2": ("layer1.*", "23.03/6.48", 25.6),
    "stage 3": ("layer2.*", "23.04/6.32", 25.7),
    "stage 4": ("layer3.*", "22.68/6.22", 26.4),
    "all": (None, "22.28/6.03", 28.1),
}
_PARAMS = ("paper M", "ours M", "ours with BN statistics M", "difference M", "the paper's errors %")
_OPTIONS = "The SE blocks have `bias=False, divisor=1`."
_STATISTICS = (
    "The paper's figures agree with a count that also has the mean and variance of each BatchNorm"
    " channel (53,120 values in ResNet-50), as files of weights do. The difference is to that"
    " column."
)


def _params(label: str, option: str, paper: float, ours: Figures, errors: str) -> Row:
    difference = signed(ours.with_statistics - paper, 2)
    figures = (f"{paper:.1f}", f"{ours.params:.2f}", f"{ours.with_statistics:.2f}", difference)
    return (label, option, *figures, errors)


def table_10() -> Table:
    base = count("resnet50", **ABLATION).base
    rows = [
        _params(f"r = {r}", f"`r={r}`", paper, count("resnet50", r=r, **ABLATION).se, errors)
        for r, (errors, paper) in RATIOS.items()
    ]
    rows.append(_params("ResNet-50", "", 25.6, base, "23.30/6.55"))
    return Table(
        "Table 10: reduction ratio (SE-ResNet-50)",
        ("", "option", *_PARAMS),
        rows,
        f"{_OPTIONS} {_STATISTICS} All rows except r = 8 agree to the printed digit. That row"
        " computes to 30.64, and no count that fits the other rows makes it 30.7 (with biases it"
        " is 30.66, but then r = 2 is 45.8).",
    )


def table_11() -> Table:
    return _errors_only(
        "Table 11: squeeze (SE-ResNet-50)",
        (
            ("max", {"squeeze": "max"}, "22.57/6.09"),
            ("avg", {"squeeze": "avg"}, "22.28/6.03"),
        ),
        f"{_OPTIONS} Both cost the same, which is one operation for each element of the map.",
    )


def table_13() -> Table:
    rows = [
        _params(
            f"SE in {stage}",
            f'`include="{glob}"`' if glob else "",
            paper,
            count("resnet50", include=glob, **ABLATION).se,
            errors,
        )
        for stage, (glob, errors, paper) in STAGES.items()
    ]
    cheap = count("resnet50", exclude="layer4.*", **ABLATION).se
    figures = (f"{cheap.params:.2f}", f"{cheap.with_statistics:.2f}")
    rows.append(("SE in stages 2 to 4", '`exclude="layer4.*"`', "–", *figures, "–", "–"))
    return Table(
        "Table 13: stages (SE-ResNet-50)",
        ("", "option", *_PARAMS),
        rows,
        f"{_OPTIONS} {_STATISTICS} The paper's stage 2 is `layer1`. The last stage costs most, so"
        " SE adds few parameters without it, as the last row shows. The paper has no figures for"
        " that row in this table.",
    )


def table_14() -> Table:
    return _errors_only(
        "Table 14: placement (SE-ResNet-50)",
        (
            ("SE", {"placement": "standard"}, "22.28/6.03"),
            ("SE-PRE", {"placement": "pre"}, "22.23/6.00"),
            ("SE-POST", {"placement": "post"}, "22.78/6.35"),
            ("SE-Identity", {"placement": "identity"}, "22.20/6.15"),
        ),
        f"{_OPTIONS} SE-PRE reads the map before the unit. In the first unit of a stage this map"
        " has fewer channels, so SE-PRE costs fewer parameters.",
    )


def table_15() -> Table:
    counted = count("resnet50", placement="3x3", **ABLATION)
    se, base = counted.se, counted.base
    rows = [
        (
            "SE-3×3",
            '`placement="3x3"`',
            "25.8",
            f"{se.params:.2f}",
            f"{se.with_statistics:.2f}",
            signed(se.with_statistics - 25.8, 2),
            "3.86",
            f"{base.macs:.3f} → {se.macs:.3f}",
            signed(se.macs - 3.86, 3),
            "22.48/6.02",
        )
    ]
    return Table(
        "Table 15: SE behind the 3×3 convolution (SE-ResNet-50)",
        ("", "option", *_PARAMS[:-1], "paper GMACs", "ours GMACs", "difference", _PARAMS[-1]),
        rows,
        f"{_OPTIONS} {_STATISTICS}",
    )


def table_16() -> Table:
    none, se = (count("resnet50", squeeze=s, **ABLATION) for s in ("none", "avg"))
    entries = (
        ("ResNet-50", "", se.base, 3.86, 25.6, "23.30/6.55"),
        ("NoSqueeze", '`squeeze="none"`', none.se, 4.27, 28.1, "22.93/6.39"),
        ("SE", "", se.se, 3.87, 28.1, "22.28/6.03"),
    )
    rows = [
        (
            label,
            option,
            f"{macs:.2f}",
            f"{ours.macs:.4f}",
            signed(ours.macs - macs, 4),
            f"{params:.1f}",
            f"{ours.params:.2f}",
            signed(ours.params - params, 2),
            errors,
        )
        for label, option, ours, macs, params, errors in entries
    ]
    return Table(
        "Table 16: no squeeze (ResNet-50)",
        (
            "",
            "option",
            "paper GMACs",
            "ours GMACs",
            "difference",
            "paper M",
            "ours M",
            "difference M",
            _PARAMS[-1],
        ),
        rows,
        f"{_OPTIONS} In v1 form the networks have 3.86, 4.27 and 3.87 GMACs and 25.6, 28.1 and"
        " 28.1 M, as in the paper to the printed digit. With timm's stride in the 3×3 convolution"
        " the base would have 4.089 GMACs.",
    )


def _errors_only(
    title: str, variants: Sequence[tuple[str, dict[str, Any], str]], remark: str
) -> Table:
    """A table for which we quote only errors from the paper."""
    rows = []
    for label, options, errors in variants:
        se = count("resnet50", **options, **ABLATION).se
        (option,) = (f'`{name}="{value}"`' for name, value in options.items())
        rows.append((label, option, f"{se.params:.2f}", f"{se.macs:.3f}", errors))
    return Table(
        title,
        ("", "option", "ours M", "ours GMACs", _PARAMS[-1]),
        rows,
        f"{remark} From the paper we quote only errors for this table, so there is no difference"
        " to give.",
    )


def table_2_units() -> Table:
    return Table(
        "Table 2: networks without residual additions",
        (
            "network",
            "SE blocks",
            "paper GFLOPs",
            "ours GMACs",
            "SE, s",
            "SE, ss",
            "paper top-1/top-5 error",
        ),
        rows_of_table_2(),
        "The SE blocks are those of `inject_se(model, divisor=1, bias=False)`. VGG-16 is"
        " torchvision's `vgg16_bn`, and BN-Inception is `examples/bn_inception.py`. In the column s"
        " the layers and the scale are counted, and in the column ss the squeeze too. VGG-16 fits s"
        " and BN-Inception fits ss, so the paper's figures follow no single convention. The ten SE"
        " blocks of BN-Inception have 639,360 weights, and 7,038 biases if they have biases. The"
        " authors' released network has as many. Inception-ResNet-v2 (11.75 → 11.76 in the paper)"
        " is left out, because timm's has 13.156 GMACs and is another variant.",
    )


def table_3() -> Table:
    return Table(
        "Table 3: mobile networks",
        (
            "network",
            "SE blocks",
            "paper M",
            "ours M",
            "paper MFLOPs",
            "ours MMACs",
            "SE, s",
            "SE, ss",
        ),
        rows_of_table_3(),
        "The SE blocks are those of `inject_se(model, divisor=1, bias=False)`. MobileNet 1.0 is"
        " timm's `mobilenetv1_100`, with SE blocks after its 13 pointwise convolutions"
        ' (`exclude="bn1"`) or after the stem too. ShuffleNet is `examples/shufflenet.py` with'
        ' `where="units"`. Its units of stride 1 add their input, and those of stride 2 concatenate'
        " it. The columns s and ss are as above, and this table fits s. The top-1 errors in the"
        " paper are 28.4 → 25.3 (MobileNet) and 32.6 → 31.0 (ShuffleNet). Its base ShuffleNet has"
        " 2.5 MMACs more than ours.",
    )


TABLES: tuple[Callable[[], Table], ...] = (
    table_1,
    table_2,
    table_2_units,
    table_3,
    table_10,
    table_11,
    table_13,
    table_14,
    table_15,
    table_16,
)


def page() -> Iterator[str]:
    """The lines of the page, as Markdown."""
    yield "# The paper's tables"
    yield ""
    yield (
        "These are networks of Hu et al., *Squeeze-and-Excitation Networks* (arXiv 1709.01507,"
        " journal version). Each is built by one option of `inject_se` and counted, and the paper's"
        " figures are beside the counts. M are millions of parameters. GMACs are what the paper"
        " calls GFLOPs, for one image of 224×224. The errors (top-1/top-5 in %, ImageNet, single"
        " crop) are the paper's, because nothing was trained here."
    )
    yield ""
    yield (
        "Made by `python examples/paper_tables.py docs/paper.md` with timm"
        f" {version('timm')} and torch {version('torch').partition('+')[0]}. Table 12 (gates) is"
        ' not shown. Its options are `gate="relu"`, `"tanh"` and `"sigmoid"`, and a gate costs no'
        " parameters and no MACs."
    )
    for make in TABLES:
        table = make()
        yield from ("", f"## {table.title}", "")
        yield f"| {' | '.join(table.columns)} |"
        yield "|" + "---|" * len(table.columns)
        yield from (f"| {' | '.join(row)} |" for row in table.rows)
        yield from ("", table.remark)


def main() -> None:
    text = "\n".join(page()) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
