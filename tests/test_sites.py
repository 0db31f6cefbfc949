"""Which additions are residual sites, on hand-written blocks: each that is beside near-misses."""

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from se_inject import NoSiteError, Plan, plan_se
from se_inject.models.names import load_model
from se_inject.reasons import Reason


def conv(channels: int = 16, out: int | None = None, k: int = 3, stride: int = 1) -> nn.Sequential:
    out = out or channels
    return nn.Sequential(
        nn.Conv2d(channels, out, k, stride, k // 2, bias=False), nn.BatchNorm2d(out)
    )


class Block(nn.Module):
    """A block whose forward is a function of itself and its input."""

    def __init__(self, forward: Callable[..., Tensor], **children: nn.Module) -> None:
        super().__init__()
        self.body = conv()
        for name, child in children.items():
            setattr(self, name, child)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


def plan_of(block: nn.Module) -> Plan | NoSiteError:
    try:
        return plan_se(Net(block), where="residual", example_input=torch.empty(2, 3, 16, 16))
    except NoSiteError as error:
        return error


def branch_in_place(m: nn.Module, x: Tensor) -> Tensor:
    out = m.body(x)
    out += x
    return out


def shortcut_in_place(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(x)
    x += m.body(x)
    return x


def add_method(m: nn.Module, x: Tensor) -> Tensor:
    return m.body(x).add_(x)


def projection(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(m.deep(x) + m.project(x))


def pooled(m: nn.Module, x: Tensor) -> Tensor:
    return m.deep(x) + m.project(F.avg_pool2d(x, 2))


def with_tail(m: nn.Module, x: Tensor) -> Tensor:
    return x + 0.5 * m.drop(m.gamma * m.body(x))


def gamma_block() -> Block:
    block = Block(with_tail, drop=nn.Dropout(0.1))
    block.gamma = nn.Parameter(torch.ones(1, 16, 1, 1))
    return block


def three_operands(m: nn.Module, x: Tensor) -> Tensor:
    return m.body(x) + m.other(x) + x


def two_units(m: nn.Module, x: Tensor) -> Tensor:
    x = x + m.body(x)
    return x + m.other(x)


def units_under_a_long_skip(m: nn.Module, x: Tensor) -> Tensor:
    h = x + m.body(x)
    h = h + m.other(h)
    return x + m.last(h)


SITES: dict[str, tuple[Callable[[], Block], int]] = {
    "body + x": (lambda: Block(lambda m, x: m.body(x) + x), 1),
    "x + body": (lambda: Block(lambda m, x: x + m.body(x)), 1),
    "out += x": (lambda: Block(branch_in_place), 1),
    "x += body": (lambda: Block(shortcut_in_place), 1),
    "torch.add(out, x)": (lambda: Block(lambda m, x: torch.add(m.body(x), x)), 1),
    "torch.add(x, other=out)": (lambda: Block(lambda m, x: torch.add(x, other=m.body(x))), 1),
    "out.add_(x)": (lambda: Block(add_method), 1),
    "alpha=1": (lambda: Block(lambda m, x: torch.add(m.body(x), x, alpha=1)), 1),
    "sum([out, x])": (lambda: Block(lambda m, x: sum([m.body(x), x])), 1),
    "F.conv2d in the forward": (
        lambda: Block(lambda m, x: x + F.conv2d(x, m.body[0].weight, padding=1)),
        1,
    ),
    "1x1 projection of a deeper branch": (
        lambda: Block(projection, deep=nn.Sequential(conv(), conv()), project=conv(k=1)),
        1,
    ),
    "1x1 projection beside one convolution": (
        lambda: Block(lambda m, x: m.body(x) + m.other(x), other=conv(k=1)),
        1,
    ),
    "pooled projection": (
        lambda: Block(pooled, deep=nn.Sequential(conv(stride=2), conv()), project=conv(k=1)),
        1,
    ),
    "layer scale, dropout and a factor": (gamma_block, 1),
    "a + b + x": (lambda: Block(three_operands, other=conv(k=1)), 1),
    "two units in one forward": (lambda: Block(two_units, other=conv()), 2),
    "units under a long skip": (
        lambda: Block(units_under_a_long_skip, other=conv(), last=conv()),
        3,
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_a_residual_addition_is_a_site_and_keeps_its_function(name: str) -> None:
    build, count = SITES[name]
    model = Net(build()).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        plan = plan_se(model, example_input=x)
        assert [site.block for site in plan.sites] == ["block"] * count
        assert [site.channels for site in plan.sites] == [16] * count
        assert torch.equal(before, plan.apply()(x))
        for site in plan.sites:
            se = model.get_submodule(site.name)
            se.fc2.bias.fill_(1.0)
            assert not torch.equal(before, model(x)), site.name
            se.fc2.bias.fill_(0.0)


def squeeze_excite(m: nn.Module, x: Tensor) -> Tensor:
    u = m.body(x)
    return x + u * torch.sigmoid(u.mean((2, 3), keepdim=True))


def expanded_gate(m: nn.Module, x: Tensor) -> Tensor:
    u = m.body(x)
    gate = torch.sigmoid(F.adaptive_avg_pool2d(u, 1).flatten(1))
    return x + u * gate.view(2, 16, 1, 1).expand_as(u)


class Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x)
        return self.kept


class Gate(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return torch.mul(torch.sigmoid(u.mean((2, 3), keepdim=True)), u)


def res2net(m: nn.Module, x: Tensor) -> Tensor:
    a, b, c, d = torch.split(m.body(x), 4, 1)
    b = m.conv2(b)
    c = m.conv3(b + c)
    return m.last(torch.cat([a, b, c, d], 1)) + x


def res2net_block() -> Block:
    return Block(res2net, conv2=conv(4), conv3=conv(4), last=conv(k=1))


def cell(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(torch.cat([m.body(x) + x, m.other(x) + F.max_pool2d(x, 3, 1, 1)], 1))


def pyramid(m: nn.Module, x: Tensor) -> Tensor:
    low = m.low(F.max_pool2d(x, 2))
    return m.body(x) + F.interpolate(low, scale_factor=2.0)


class RepBlock(Block):
    def reparameterize(self) -> None:
        raise AssertionError("planning must not fold anything")


def rep_sum(m: nn.Module, x: Tensor) -> Tensor:
    return m.body(x) + m.point(x) + m.norm(x)


def rep_residual(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.body(F.relu(m.point(x)))


def tokens(m: nn.Module, x: Tensor) -> Tensor:
    t = m.body(x).flatten(2).transpose(1, 2)
    return t + m.linear(t)


NEAR_MISSES: dict[str, tuple[Callable[[], Block], dict[Reason, int]]] = {
    "x + 1": (lambda: Block(lambda m, x: m.body(x) + 1), {}),
    "x + pos_embed": (lambda: with_parameter((1, 16, 16, 16)), {}),
    "x + bias of a full shape": (lambda: with_parameter((2, 16, 16, 16)), {}),
    "[N, C, H, W] + [N, C, 1, 1]": (
        lambda: Block(lambda m, x: m.body(x) + x.mean((2, 3), keepdim=True)),
        {},
    ),
    "concat": (lambda: Block(lambda m, x: torch.cat([x, m.body(x)], 1)), {}),
    "x - body": (lambda: Block(lambda m, x: x - m.body(x)), {}),
    "vectors": (lambda: Block(lambda m, x: m.body(x).mean((2, 3)) + x.mean((2, 3))), {}),
    "alpha=0.5": (
        lambda: Block(lambda m, x: torch.add(x, m.body(x), alpha=0.5)),
        {Reason.SCALED: 1},
    ),
    "no convolution": (
        lambda: Block(lambda m, x: x + F.avg_pool2d(x, 3, 1, 1) - x),
        {Reason.NO_CONVOLUTION: 1},
    ),
    "x + x": (lambda: Block(lambda m, x: x + x), {Reason.NO_CONVOLUTION: 1}),
    "two convolutions of one depth": (
        lambda: Block(lambda m, x: m.body(x) + m.other(x), other=conv()),
        {Reason.FUSION: 1},
    ),
    "1x1 convolutions of one depth": (
        lambda: Block(lambda m, x: m.one(x) + m.other(x), one=conv(k=1), other=conv(k=1)),
        {Reason.FUSION: 1},
    ),
    "long projection": (
        lambda: Block(
            lambda m, x: m.deep(x) + m.project(x),
            deep=nn.Sequential(*(conv() for _ in range(4))),
            project=nn.Sequential(*(conv() for _ in range(3))),
        ),
        {Reason.FUSION: 1},
    ),
    "cell": (
        lambda: Block(cell, other=conv(), last=conv(32, 16, 1)),
        {Reason.FUSION: 2},
    ),
    "feature pyramid": (lambda: Block(pyramid, low=conv(k=1)), {Reason.FUSION: 1}),
    "gate in the forward": (lambda: Block(squeeze_excite), {Reason.GATED: 1}),
    "gate expanded to the map": (lambda: Block(expanded_gate), {Reason.GATED: 1}),
    "gate in a child": (
        lambda: Block(lambda m, x: x + m.gate(m.body(x)), gate=Gate()),
        {Reason.GATED: 1},
    ),
    "gate deep in a child": (
        lambda: Block(
            lambda m, x: x + m.deep(x), deep=nn.Sequential(conv(), nn.Sequential(Gate()), conv())
        ),
        {Reason.GATED: 1},
    ),
    "an operand that a child keeps": (
        lambda: Block(lambda m, x: m.keeper(x) + m.keeper.kept, keeper=Keeper()),
        {Reason.FUSION: 1},
    ),
    "re-parameterisable": (
        lambda: RepBlock(rep_sum, point=conv(k=1), norm=nn.BatchNorm2d(16)),
        {Reason.REPARAMETERISABLE: 2},
    ),
    "tokens": (lambda: Block(tokens, linear=nn.Linear(16, 16)), {Reason.TOKENS: 1}),
}


def with_parameter(shape: tuple[int, ...]) -> Block:
    block = Block(lambda m, x: m.body(x) + m.embed)
    block.embed = nn.Parameter(torch.zeros(shape))
    return block


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_no_site_and_says_why(name: str) -> None:
    build, reasons = NEAR_MISSES[name]
    error = plan_of(build())
    assert isinstance(error, NoSiteError)
    if reasons:
        for reason, count in reasons.items():
            assert f"{count} x {reason}" in str(error)
    else:
        assert "adds no two maps of the same shape" in str(error)


def test_res2nets_inner_additions_are_left_alone_beside_the_outer_site() -> None:
    plan = plan_of(res2net_block())
    assert isinstance(plan, Plan)
    assert len(plan.sites) == 1
    assert plan.sites[0].channels == 16
    assert [s.reason for s in plan.skipped] == [Reason.INNER]


def test_a_reparameterisable_class_keeps_its_real_residual_sites() -> None:
    plan = plan_of(RepBlock(rep_residual, point=conv(k=1)))
    assert isinstance(plan, Plan)
    assert len(plan.sites) == 1


class Caller(nn.Module):
    """DLA: the caller computes the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.project = conv(k=1)
        self.block = CallerBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, shortcut=self.project(x))


class CallerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv()

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        out = self.body(x)
        out += shortcut
        return out


def test_a_shortcut_that_the_caller_computed_is_a_shortcut() -> None:
    plan = plan_of(Caller())
    assert isinstance(plan, Plan)
    assert [site.block for site in plan.sites] == ["block.block"]


# --- the libraries -----------------------------------------------------------------------------

COUNTS = {
    "resnet101": 33,
    "resnetv2_50": 16,
    "regnetx_064": 17,
    "dla60": 16,
    "dpn68": 22,
    "xception41": 12,
    "mobilenetv4_conv_small": 10,
    "efficientnet_lite0": 9,
    "hrnet_w18_small": 23,
    "inception_resnet_v2": 40,
    "res2net50_26w_4s": 16,
    "mambaout_tiny": 18,
    "torchvision/deeplabv3_resnet50": 16,
    "torchvision/r3d_18": 8,
    "torchvision/raft_small": 12,
}


@pytest.mark.parametrize("name", COUNTS)
def test_library_networks_have_their_residual_blocks(name: str) -> None:
    # RAFT repeats the same update twelve times by default, and its blocks are before them.
    example = (torch.empty(1, 3, 128, 128), torch.empty(1, 3, 128, 128), 1)
    options: Any = {"example_input": example} if name == "torchvision/raft_small" else {}
    plan = plan_se(load_model(name, meta=True), **options)
    assert len(plan.sites) == COUNTS[name]
    assert len({site.block for site in plan.sites}) == COUNTS[name]


LEFT_ALONE = {
    "seresnet50": {Reason.GATED: 16},
    "ecaresnet26t": {Reason.GATED: 8},
    "efficientnet_b0": {Reason.GATED: 9},
    "regnety_002": {Reason.GATED: 13},
    "resnest14d": {Reason.GATED: 4},
    "skresnet18": {Reason.GATED: 8},
    "repvgg_a0": {Reason.REPARAMETERISABLE: 39},
    "nasnetalarge": {Reason.FUSION: 92, Reason.NO_CONVOLUTION: 18},
    "vit_tiny_patch16_224": {Reason.TOKENS: 24},
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_library_networks_without_a_site_say_why(name: str) -> None:
    with pytest.raises(NoSiteError) as caught:
        plan_se(load_model(name, meta=True), where="residual")
    for reason, count in LEFT_ALONE[name].items():
        assert f"{count} x {reason}" in str(caught.value)


@pytest.mark.parametrize("name", ["densenet121", "vgg16", "inception_v3", "squeezenet1_0"])
def test_library_networks_without_additions_say_so(name: str) -> None:
    name = f"torchvision/{name}" if name.startswith("squeeze") else name
    with pytest.raises(NoSiteError, match="adds no two maps of the same shape"):
        plan_se(load_model(name, meta=True), where="residual")


def test_a_detectors_pyramid_is_fusion_and_its_backbone_is_served() -> None:
    # Nothing is said of its head: it stops while it picks boxes, when all maps are made.
    plan = plan_se(load_model("torchvision/fasterrcnn_resnet50_fpn", meta=True))
    assert len(plan.sites) == 16
    assert Counter((s.block, s.reason) for s in plan.skipped) == {
        ("backbone.fpn", Reason.FUSION): 3,
        ("", Reason.NOT_REACHED): 1,
    }


def test_hrnets_fuse_layers_and_res2nets_inner_sums_are_counted_in_skipped() -> None:
    hrnet = plan_se(load_model("hrnet_w18_small", meta=True))
    assert Counter(s.reason for s in hrnet.skipped) == {Reason.FUSION: 23}
    res2net50 = plan_se(load_model("res2net50_26w_4s", meta=True))
    assert Counter(s.reason for s in res2net50.skipped) == {Reason.INNER: 24}


class Additions(TorchDispatchMode):
    """Counts, without se_inject, the additions of equal 4-D shapes that aten really ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            a, b = args[:2]
            self.count += isinstance(b, Tensor) and a.dim() == 4 and a.shape == b.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["hrnet_w18_small", "res2net50_26w_4s", "dla34", "mobilenetv2_100", "dpn68"]
)
def test_every_addition_of_two_maps_is_planned_or_skipped(name: str) -> None:
    model = load_model(name, meta=True).eval()
    with torch.no_grad(), Additions() as additions:
        model(torch.empty(2, 3, 224, 224, device="meta"))
    plan = plan_se(model)
    assert len(plan.sites) + len(plan.skipped) == additions.count


def test_the_detector_of_gates_does_not_mistake_a_spatial_gate() -> None:
    block = Block(lambda m, x: x + m.body(x) * torch.sigmoid(x.mean(1, keepdim=True)))
    plan = plan_of(block)
    assert isinstance(plan, Plan)
    assert len(plan.sites) == 1


class Row(nn.Module):
    """Residual units one after another in one forward."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.conv, self.length = nn.Conv2d(3, 3, 1), length

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.length):
            x = x + self.conv(x)
        return x


def test_a_row_of_additions_may_be_longer_than_pythons_stack() -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 400)
    try:
        plan = plan_se(Row(300), r=1, divisor=1, example_input=torch.empty(1, 3, 4, 4))
    finally:
        sys.setrecursionlimit(before)
    assert len(plan.sites) == 300


class SumThenUnit(nn.Module):
    """A bare norm and two convolutions, but one of these reads the sum before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.norm(x)
        return y + self.conv(y) + self.last(x)


def test_units_one_after_another_are_no_repvgg() -> None:
    plan = plan_se(SumThenUnit(), r=2, divisor=1, example_input=torch.empty(1, 4, 4, 4))
    assert len(plan.sites) == 1
    assert {entry.reason for entry in plan.skipped} == {Reason.NO_CONVOLUTION, Reason.FUSION}
