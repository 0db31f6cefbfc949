"""The rules of units, each beside its near-miss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_inject import ArgumentError, NoSiteError, Plan, plan_se
from se_inject.models.names import load_model
from se_inject.reasons import Reason

X = torch.randn(2, 8, 8, 8)


class Block(nn.Module):
    """A block whose forward is a function of the test."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.wide = nn.Conv2d(16, 8, 1)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean((2, 3)))


def plan_of(forward: Callable[[Any, Tensor], Tensor], **options: Any) -> Plan | NoSiteError:
    net = Net(Block(forward))
    net(X)
    try:
        return plan_se(net, 2, example_input=X, **options)
    except NoSiteError as error:
        return error


def gate(x: Tensor, m: Any) -> Tensor:
    return x * torch.sigmoid(m.c(x.mean((2, 3), keepdim=True)))


# The channels of the maps that are scaled, in their order.
UNITS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[int]]] = {
    "inception": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), [16]),
    "inception with a pooled input": (
        lambda m, x: torch.cat([m.a(x), m.b(x), F.max_pool2d(x, 3, 1, 1)], 1),
        [24],
    ),
    "one new map beside the input": (lambda m, x: torch.cat([x, m.a(x)], 1), [8]),
    "two new maps beside the input": (lambda m, x: torch.cat([x, m.a(x), m.b(x)], 1), [8, 8]),
    "a split block": (lambda m, x: torch.cat([x[:, :4], m.a(x)[:, 4:]], 1), [4]),
    "a short projection beside the branch": (
        lambda m, x: torch.cat([m.a(x), m.c(m.b(x))], 1),
        [8],
    ),
    "a convolution after the join": (lambda m, x: m.wide(torch.cat([m.a(x), m.b(x)], 1)), [8]),
    "before dropout": (
        lambda m, x: F.dropout(m.wide(torch.cat([m.a(x), m.b(x)], 1)), 0.1, m.training),
        [8],
    ),
    "two joins in a row": (
        lambda m, x: torch.cat([m.c(y := m.wide(torch.cat([m.a(x), m.b(x)], 1))), m.a(y)], 1),
        [16, 16],
    ),
    "a chain": (lambda m, x: F.relu(m.b(F.relu(m.a(x)))), [8, 8]),
    "a silu by hand": (lambda m, x: (y := m.a(x)) * torch.sigmoid(y), [8]),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_are_found(name: str) -> None:
    forward, channels = UNITS[name]
    plan = plan_of(forward)
    assert isinstance(plan, Plan), plan
    assert [site.channels for site in plan.sites] == channels
    assert {(site.kind, site.block) for site in plan.sites} == {("unit", "block")}
    with torch.no_grad():
        torch.manual_seed(0)
        before = plan.model(X.clone())
        model = plan.apply()  # which draws random numbers of its own
        torch.manual_seed(0)
        assert torch.equal(model(X.clone()), before)


NEAR_MISSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[Reason]]] = {
    "a concatenation of what was given": (lambda m, x: torch.cat([x, F.relu(x)], 1), set()),
    "along the height": (lambda m, x: torch.cat([m.a(x), m.b(x)], 2), set()),
    "no activation": (lambda m, x: m.b(m.a(x)), set()),
    "a gate in the unit": (
        lambda m, x: torch.cat([m.a(x), gate(m.b(x), m)], 1),
        {Reason.UNIT_GATED},
    ),
    "a fusion beside the input": (
        lambda m, x: m.a(x) + m.b(x),
        {Reason.FUSION},
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_no_units(name: str) -> None:
    forward, reasons = NEAR_MISSES[name]
    error = plan_of(forward)
    assert isinstance(error, NoSiteError)
    assert {entry.reason for entry in error.skipped} == reasons


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.LazyLinear(3))


def test_a_shared_activation_is_skipped_with_the_reason() -> None:
    act = nn.ReLU()
    net = sequential(nn.Conv2d(8, 8, 3), act, nn.Conv2d(8, 8, 3), act)
    net(X)
    with pytest.raises(NoSiteError, match="an activation that several units share"):
        plan_se(net, 2, example_input=X)


def test_nothing_learns_after_the_last_unit() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    plan = plan_se(net, 2, example_input=X)
    assert [site.block for site in plan.sites] == ["1"]
    assert [entry.reason for entry in plan.skipped] == [Reason.NOTHING_LEARNS]


def test_a_depthwise_convolution_belongs_to_the_pointwise_one() -> None:
    pair = (nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU())
    net = sequential(*pair)
    net(X)
    assert [site.channels for site in plan_se(net, 2, example_input=X).sites] == [16]


def test_no_child_is_added_to_a_sequential() -> None:
    net = sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    net(X)
    plan_se(net, 2, example_input=X).apply()
    assert len(net[0]) == 3
    assert [name for name, _ in net[0][2].named_children()] == ["se"]


def test_one_dimension() -> None:
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3))
    plan = plan_se(net, 2, example_input=torch.randn(2, 2, 32))
    assert [site.shape for site in plan.sites] == [(8, 30)]


def test_a_unet_is_a_chain_and_its_skips_are_no_joins() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        skip = F.relu(m.a(x))
        deep = F.relu(m.b(F.max_pool2d(skip, 2)))
        return F.relu(m.wide(torch.cat([skip, F.interpolate(deep, scale_factor=2)], 1)))

    plan = plan_of(forward)
    assert isinstance(plan, Plan)
    assert {site.kind for site in plan.sites} == {"unit"}


# --- where ---------------------------------------------------------------------------------------


def test_other_placements_are_of_residual_additions() -> None:
    chain, _ = UNITS["a chain"]
    with pytest.raises(ArgumentError, match="placement='pre' needs residual additions"):
        plan_of(chain, where="units", placement="pre")
    assert "which placement='post' needs" in str(plan_of(chain, placement="post"))
    with pytest.raises(ArgumentError, match="where='all' is not known"):
        plan_of(chain, where="all")


def test_globs_that_match_nothing_are_told_what_there_is() -> None:
    chain, _ = UNITS["a chain"]
    for options in ({"include": "x*"}, {"exclude": "x*"}):
        with pytest.raises(ArgumentError, match=r"='x\*' matches no unit\. Names are like 'block'"):
            plan_of(chain, **options)
    beside: Any = lambda m, x: m.a(x) + x  # noqa: E731
    with pytest.raises(ArgumentError, match=r"matches no block with an addition\. Names"):
        plan_of(beside, include="x*")


def test_residual_alone_names_the_way_to_units() -> None:
    chain, _ = UNITS["a chain"]
    assert "where='auto' takes its other units" in str(plan_of(chain, where="residual"))


SAMPLE = [
    "resnet18",
    "convnext_atto",
    "seresnet18",
    "efficientnet_b0",
    "res2net50_26w_4s",
    "dpn68",
    "dla34",
    "ghostnet_100",
    "hrnet_w18_small",
    "mobilenetv2_100",
    "vit_tiny_patch16_224",
    "poolformer_s12",
    "resnest14d",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_auto_changes_no_plan_that_works_and_no_refusal_of_additions(name: str) -> None:
    plans = []
    for where in ("residual", "auto"):
        try:
            plan = plan_se(load_model(name, meta=True), where=where)
            plans.append((plan.to_dict()["sites"], plan.skipped))
        except NoSiteError as error:
            plans.append((str(error), tuple(error.skipped)))
    assert plans[0] == plans[1]
