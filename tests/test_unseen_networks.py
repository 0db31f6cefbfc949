"""Residual sites in the idioms of other people's networks: each kind beside its near-misses."""

import functools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import same_before_and_after
from torch import Tensor, nn

from se_inject import NoSiteError, inject_se, plan_se
from se_inject.reasons import Reason

X = torch.randn(2, 3, 16, 16)


def conv(c: int = 16, out: int | None = None, k: int = 3, stride: int = 1) -> nn.Sequential:
    out = out or c
    return nn.Sequential(nn.Conv2d(c, out, k, stride, k // 2, bias=False), nn.BatchNorm2d(out))


def deep(c: int = 16, out: int | None = None, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(c, out, stride=stride), nn.ReLU(), conv(out or c))


class Written(nn.Module):
    """A module whose forward is a function of itself and what it is called with."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


class Block(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = block

    def forward(self, x: Tensor, *args: Tensor) -> Any:
        return self.block(self.stem(x), *args)


def found(network: nn.Module, *inputs: Tensor) -> tuple[list[str], list[str]]:
    """The blocks with a site, and the reasons of the others."""
    try:
        plan = plan_se(network, example_input=inputs or (X,), where="residual")
    except NoSiteError as error:
        return [], [s.reason for s in error.skipped]
    return [site.block for site in plan.sites], [s.reason for s in plan.skipped]


# --- a child that returns several maps -----------------------------------------------------------

Pair = namedtuple("Pair", "branch given")


@dataclass
class Maps:
    branch: Tensor
    given: Tensor


class Body(nn.Module):
    """The branch, and the pre-activated input that the shortcut is projected from."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.first, self.second, self.give = (
            nn.BatchNorm2d(16),
            conv(16, 32),
            conv(32),
            give,
        )

    def forward(self, x: Tensor) -> Any:
        given = F.relu(self.norm(x))
        return self.give(self.second(F.relu(self.first(given))), given)


class PreActivated(nn.Module):
    def __init__(self, give: Any, take: Any, skip: nn.Module) -> None:
        super().__init__()
        self.body, self.skip, self.take = Body(give), skip, take

    def forward(self, x: Tensor) -> Tensor:
        branch, given = self.take(self.body(x))
        return branch + self.skip(given)


SEVERAL = {
    "tuple": (lambda b, g: (b, g), lambda out: out),
    "list": (lambda b, g: [g, b], lambda out: (out[1], out[0])),
    "dict": (lambda b, g: {"g": g, "b": b}, lambda out: (out["b"], out["g"])),
    "namedtuple": (Pair, lambda out: (out.branch, out.given)),
    "dataclass": (Maps, lambda out: (out.branch, out.given)),
    "nested": (lambda b, g: (b, {"g": [g]}), lambda out: (out[0], out[1]["g"][0])),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_two_maps_of_one_child_the_deeper_one_is_scaled(name: str) -> None:
    network = Net(PreActivated(*SEVERAL[name], nn.Conv2d(16, 32, 1))).eval()
    with torch.no_grad():
        before = network(X)
        inject_se(network, example_input=X)
        block = network.block
        assert torch.equal(network(X), before)
        block.se.fc2.bias.fill_(-1e4)  # gates shut: the shortcut is left
        _, given = block.take(block.body(network.stem(X)))
        torch.testing.assert_close(network(X), block.skip(given))


def test_two_equal_maps_of_one_child_are_fused() -> None:
    skip = conv(16, 32)  # as deep as what is between the maps, and spatial itself
    network = Net(PreActivated(lambda b, g: (F.relu(b), b), lambda out: out, nn.Identity()))
    assert found(network) == ([], [Reason.NO_CONVOLUTION])
    two = Block(lambda m, x: (lambda a, b: a + b)(*m.body(x)))
    two.body = Written(lambda m, x: (m.a(x), m.b(x)), a=conv(16, 32), b=skip)
    assert found(Net(two)) == ([], [Reason.FUSION])


def test_a_gate_on_the_other_map_of_a_child_does_not_count() -> None:
    body = Written(lambda m, x: (m.branch(x), m.gate(x)), branch=deep(), gate=Gate())
    block = Block(lambda m, x: (lambda a, b: a + x)(*m.body(x)), body=body)
    assert found(Net(block))[0] == ["block"]


# --- gated elsewhere -----------------------------------------------------------------------------


class Gate(nn.Module):
    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.fc = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Project(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(32, 16, 1)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.conv(x) + shortcut


GATED = {
    "gate in the parent": (Gate(32), Project(), 0),
    "gate in the grandparent": (Gate(32), Written(lambda m, a, b: m.p(a, b), p=Project()), 0),
    "by keyword": (Gate(32), Written(lambda m, a, b: m.p(a, shortcut=b), p=Project()), 0),
    "no gate": (nn.Identity(), Project(), 1),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_before_the_call_gates_the_branch(name: str) -> None:
    gate, out, count = GATED[name]
    block = Block(
        lambda m, x: m.out(m.gate(F.relu(m.up(x))), x), up=conv(16, 32), gate=gate, out=out
    )
    sites, reasons = found(Net(block))
    assert len(sites) == count
    assert reasons == ([] if count else [Reason.GATED])


# --- additions in modules of their own -----------------------------------------------------------


class AddInPlace(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a += b
        return a


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * self.gamma + b


def adder(forward: Callable[..., Any]) -> nn.Module:
    return type("Adder", (nn.Module,), {"forward": forward})()


PAIRS = {
    "a + b": lambda: adder(lambda m, a, b: a + b),
    "*maps": lambda: adder(lambda m, *maps: maps[0] + maps[1]),
    "relu(a + b)": lambda: adder(lambda m, a, b: F.relu(a + b)),
    "a += b": AddInPlace,
    "a * gamma + b": Scaled,
}
LISTS = {
    "maps[0] + maps[1]": lambda: adder(lambda m, maps: maps[0] + maps[1]),
    "sum(maps)": lambda: adder(lambda m, maps: sum(maps)),
    "reduce": lambda: adder(lambda m, maps: functools.reduce(lambda a, b: a + b, maps)),
    "stack.sum": lambda: adder(lambda m, maps: torch.stack(maps).sum(0)),
}


def own_addition(name: str) -> Block:
    if name in PAIRS:
        add = PAIRS[name]()
        return Block(lambda m, x: m.add(m.body(x), x), body=deep(), add=add)
    return Block(lambda m, x: m.add([m.body(x), x]), body=deep(), add=LISTS[name]())


@pytest.mark.parametrize("name", [*PAIRS, *LISTS])
def test_an_addition_in_a_module_of_its_own_is_served(name: str) -> None:
    network = Net(own_addition(name)).eval()
    with torch.no_grad():
        before = network(X)
        plan = plan_se(network, example_input=X)
        assert [s.block.removesuffix(".add") for s in plan.sites] == ["block"]
        assert not plan.skipped
        assert torch.equal(plan.apply()(X), before)
        network.get_submodule(plan.sites[0].name).fc2.bias.fill_(-1e4)
        x = network.stem(X)
        torch.testing.assert_close(network(X), F.relu(x) if "relu" in name else x)


def test_a_list_made_by_one_child_and_added_by_the_next_in_a_sequential() -> None:
    maps = Written(lambda m, x: [m.body(x), x], body=deep())
    assert found(Net(nn.Sequential(maps, LISTS["reduce"](), nn.ReLU()))) == (["block.1"], [])


def test_one_adder_that_three_units_share() -> None:
    def three(m: Any, x: Tensor) -> Tensor:
        for body in m.bodies:
            x = m.add(body(x), x)
        return x

    block = Block(three, bodies=nn.ModuleList(deep() for _ in range(3)), add=PAIRS["a + b"]())
    assert found(Net(block)) == (["block"] * 3, [])


def test_adders_called_in_both_orders_get_a_forward_each() -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        x = m.one(m.a(x), x)
        return m.two(x, m.b(x))

    scaled = [adder(lambda m, a, b: F.relu(a + b)) for _ in range(2)]
    scaled[1].__class__ = type(scaled[0])
    network = Net(Block(both, a=deep(), b=deep(), one=scaled[0], two=scaled[1])).eval()
    with torch.no_grad():
        inject_se(network, example_input=X)
        for add in scaled:
            add.se.fc2.bias.fill_(-1e4)
        torch.testing.assert_close(network(X), F.relu(network.stem(X)))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (
            Block(lambda m, x: m.add(m.a(x), m.b(x)), a=deep(), b=deep(), add=PAIRS["a + b"]()),
            Reason.FUSION,
        ),
        (Block(lambda m, x: m.add(F.relu(x), x), add=PAIRS["a + b"]()), Reason.NO_CONVOLUTION),
        (
            Block(lambda m, x: m.add(m.g(m.a(x)), x), a=deep(), g=Gate(), add=PAIRS["a + b"]()),
            Reason.GATED,
        ),
    ],
)
def test_an_addition_of_its_own_that_is_no_site_says_why(block: Block, reason: Reason) -> None:
    assert found(Net(block)) == ([], [reason])


# --- decoders ------------------------------------------------------------------------------------


def unpooled(m: Any, x: Tensor) -> Tensor:
    low, where = F.max_pool2d(x, 2, return_indices=True)
    return x + F.max_unpool2d(m.low(low), where, 2)


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


class Plain(nn.Module):
    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.body = deep(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


DECODED = {
    "lateral + upsampled": Block(
        lambda m, x: m.lat(x) + up(m.low(pool(x))), lat=conv(k=1), low=deep()
    ),
    "identity + upsampled": Block(lambda m, x: x + up(m.low(pool(x))), low=deep()),
    "in one child": Block(
        lambda m, x: x + m.low(x),
        low=nn.Sequential(nn.MaxPool2d(2), deep(), nn.Upsample(scale_factor=2)),
    ),
    "transposed": Block(
        lambda m, x: m.up(m.down(x)) + x,
        down=conv(16, 32, 3, 2),
        up=nn.ConvTranspose2d(32, 16, 2, 2),
    ),
    "pixel shuffle": Block(lambda m, x: x + F.pixel_shuffle(m.low(x), 2), low=conv(16, 64, 3, 2)),
    "unpooled": Block(unpooled, low=deep()),
    "skip as an argument": Block(
        lambda m, x: m.add(up(m.low(pool(x))), x),
        low=deep(),
        add=Written(lambda m, a, skip: m.conv(a) + skip, conv=conv()),
    ),
    "CSP with activations": Block(
        lambda m, x: m.m(m.a(x)) + F.silu(m.b(x)), a=conv(k=1), b=conv(k=1), m=deep()
    ),
}


@pytest.mark.parametrize("name", DECODED)
def test_a_sum_of_a_decoder_is_fusion(name: str) -> None:
    assert found(Net(DECODED[name])) == ([], [Reason.FUSION])


def test_a_csp_stage_keeps_its_units() -> None:
    stage = nn.Sequential(Plain(), Plain())
    block = Block(lambda m, x: m.m(m.a(x)) + m.b(x), a=conv(k=1), b=conv(k=1), m=stage)
    assert found(Net(block)) == (["block.m.0", "block.m.1"], [Reason.FUSION])


def test_units_in_a_row_beside_a_projection_are_a_branch() -> None:
    """RoR's stages: the row begins at the split point, not at a projection of its own."""
    block = Block(
        lambda m, x: m.units(x) + m.p(x), units=nn.Sequential(Plain(), Plain()), p=conv(k=1)
    )
    assert found(Net(block)) == (["block", "block.units.0", "block.units.1"], [])


def test_a_residual_onto_three_channels_is_left_alone() -> None:
    network = Block(
        lambda m, x: x + m.body(x), body=nn.Sequential(conv(3, 16), Plain(), conv(16, 3))
    )
    assert found(network) == (["body.1"], [Reason.IMAGE])


def test_a_unit_of_three_channels_is_a_unit() -> None:
    """MONAI's last unit on two classes: no image that wider maps are brought back to."""
    unit = Block(lambda m, x: x + m.body(x), body=conv(3))
    network = Net(nn.Sequential(Plain(), conv(16, 3), unit))
    assert found(network) == (["block.0", "block.2"], [])


def test_a_strided_convolution_beside_a_strided_projection() -> None:
    """MONAI's strided units with one subunit: both convolutions are 3x3."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.a(x)) + m.p(x)

    strided = Block(forward, a=conv(stride=2), p=nn.Conv2d(16, 16, 3, 2, 1))
    assert found(Net(strided)) == (["block"], [])
    linear = Block(lambda m, x: m.a(x) + m.p(x), a=conv(stride=2), p=nn.Conv2d(16, 16, 3, 2, 1))
    assert found(Net(linear)) == ([], [Reason.FUSION])
    same_size = Block(forward, a=conv(), p=nn.Conv2d(16, 16, 3, 1, 1))
    assert found(Net(same_size)) == ([], [Reason.FUSION])


NOT_DECODED = {
    "both upsampled": Block(
        lambda m, x: m.b(up(m.a(x))) + m.p(up(x)), a=conv(), b=conv(), p=conv(k=1)
    ),
    "both downsampled": Block(lambda m, x: m.b(x) + F.avg_pool2d(x, 2), b=deep(stride=2)),
    "transposed without more positions": Block(
        lambda m, x: x + m.b(x), b=nn.Sequential(conv(), nn.ConvTranspose2d(16, 16, 3, padding=1))
    ),
    "a path of full resolution beside": Block(
        lambda m, x: x + m.out(torch.cat([m.a(x), up(m.low(pool(x)))], 1)),
        a=conv(),
        low=conv(),
        out=conv(32, 16),
    ),
}


@pytest.mark.parametrize("name", NOT_DECODED)
def test_resampling_alone_makes_no_decoder(name: str) -> None:
    assert found(Net(NOT_DECODED[name]))[0] == ["block"]


# --- re-parameterisable --------------------------------------------------------------------------


class Parallel(nn.Module):
    def __init__(self, terms: Callable[..., Tensor]) -> None:
        super().__init__()
        self.c3, self.c1, self.norm, self.terms = conv(), conv(k=1), nn.BatchNorm2d(16), terms

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.terms(self, x))


def reparameterize_layer(self: Any) -> None: ...
def merge_kernel(self: Any) -> None: ...
def convert_to_deploy(self: Any) -> None: ...
def fuse_reparam(self: Any) -> None: ...
def fuse_model(self: Any) -> None: ...
def split_heads(self: Any) -> None: ...


def finish(self: Any) -> None:
    kernel = self.c3[0].weight + F.pad(self.c1[0].weight, [1] * 4)
    self.one = nn.Conv2d(16, 16, 3, padding=1)
    self.one.weight.data = kernel


def simpler(self: Any) -> Tensor:
    return self.c3[0].weight * (self.norm.running_var + 1e-5).rsqrt()


def init_weights(self: Any) -> None:
    nn.init.kaiming_normal_(self.c3[0].weight)


def with_method(method: Any, terms: Callable[..., Tensor]) -> Net:
    members = {method.__name__: method} if method else {}
    return Net(type("Custom", (Parallel,), members)(terms))


def three(m: Any, x: Tensor) -> Tensor:
    return m.c3(x) + m.c1(x) + m.norm(x)


def two(m: Any, x: Tensor) -> Tensor:
    return m.c3(x) + x


def bent(m: Any, x: Tensor) -> Tensor:
    return m.c3(F.relu(m.c1(x))) + x


FOLDING = [reparameterize_layer, merge_kernel, convert_to_deploy, fuse_reparam, finish, simpler]


@pytest.mark.parametrize("method", FOLDING)
@pytest.mark.parametrize(("terms", "sums"), [(three, 2), (two, 1)])
def test_a_linear_sum_in_a_class_that_folds_is_left_alone(
    method: Any, terms: Any, sums: int
) -> None:
    assert found(with_method(method, terms)) == ([], [Reason.REPARAMETERISABLE] * sums)


def test_repvggs_three_terms_need_no_method() -> None:
    assert found(with_method(None, three)) == ([], [Reason.REPARAMETERISABLE] * 2)


@pytest.mark.parametrize("method", [None, fuse_model, split_heads, init_weights])
def test_a_linear_branch_in_a_class_that_does_not_fold_is_a_site(method: Any) -> None:
    assert found(with_method(method, two)) == (["block"], [])


def merge(self: Any, x: Tensor, h: Tensor) -> Tensor:
    return x + h


def test_a_method_that_the_forward_calls_folds_nothing() -> None:
    """``merge`` of a shortcut and a branch has the name of a method that folds kernels."""
    folds = type("Folds", (Parallel,), {"merge": merge})

    class Merges(folds):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return self.merge(x, self.c3(x))

    assert found(Net(Merges(two))) == (["block"], [])
    assert found(Net(folds(two))) == ([], [Reason.REPARAMETERISABLE])


@pytest.mark.parametrize("method", FOLDING)
def test_a_branch_with_an_activation_cannot_be_folded(method: Any) -> None:
    assert found(with_method(method, bent)) == (["block"], [])


# --- conditioned blocks --------------------------------------------------------------------------


class Conditioned(nn.Module):
    def __init__(self, how: str, projected: bool) -> None:
        super().__init__()
        self.first, self.second, self.of_time = conv(), conv(), nn.Linear(8, 32)
        self.skip = nn.Conv2d(16, 16, 1) if projected else nn.Identity()
        self.how = how

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "mask":
            return (self.second(F.silu(h * t)) + self.skip(x * t)) * t
        scale, shift = self.of_time(t)[:, :, None, None].chunk(2, 1)
        if self.how == "added":
            h = h + shift
        elif self.how == "scaled and shifted":
            h = h * (1 + scale) + shift
        else:
            h = h * scale.sigmoid()
        return self.second(F.silu(h)) + self.skip(x)


@pytest.mark.parametrize("how", ["added", "scaled and shifted", "style", "mask"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_conditioned_block_is_residual(how: str, projected: bool, keyword: bool) -> None:
    t = torch.randn(2, 1, 16, 16) if how == "mask" else torch.randn(2, 8)
    block = Conditioned(how, projected)
    call = (lambda m, x, t: m.b(x, t=t)) if keyword else (lambda m, x, t: m.b(x, t))
    assert found(Net(Written(call, b=block)), X, t) == (["block.b"], [])


def test_a_gate_from_the_map_beside_a_condition_still_gates() -> None:
    block = Written(
        lambda m, x, t: x + m.gate(m.body(x) * t[:, :, None, None]), gate=Gate(), body=deep()
    )
    assert found(Net(block), X, torch.randn(2, 16)) == ([], [Reason.GATED])


# --- zero-padded shortcuts -----------------------------------------------------------------------


def half(x: Tensor) -> Tensor:
    return x[:, :, ::2, ::2]


PADDED = {
    "zeros_like": lambda x: torch.cat((half(x), torch.zeros_like(half(x))), 1),
    "new_zeros": lambda x: torch.cat((F.avg_pool2d(x, 2), x.new_zeros(x.shape[0], 16, 8, 8)), 1),
    "zeros": lambda x: torch.cat((F.avg_pool2d(x, 1, 2), torch.zeros(x.shape[0], 16, 8, 8)), 1),
    "times zero": lambda x: torch.cat((half(x), half(x).mul(0)), 1),
    "both sides": lambda x: torch.cat([half(x)[:, :8] * 0, half(x), half(x)[:, :8] * 0], 1),
    "pad": lambda x: F.pad(half(x), (0, 0, 0, 0, 8, 8)),
    "pad space too": lambda x: half(F.pad(x, (0, 1, 0, 1, 0, 16))[..., :-1, :-1]),
    "repeated": lambda x: torch.cat([half(x)] * 2, 1),
}


@pytest.mark.parametrize("name", PADDED)
def test_a_shortcut_padded_with_zeros_is_a_shortcut(name: str) -> None:
    block = Block(lambda m, x: F.relu(m.body(x) + PADDED[name](x)), body=deep(16, 32, 2))
    assert found(Net(block)) == (["block"], [])


def test_a_concatenation_of_convolved_maps_is_no_padding() -> None:
    block = Block(
        lambda m, x: m.body(x) + torch.cat((m.a(x), m.b(x)), 1),
        body=deep(16, 32),
        a=conv(k=1),
        b=conv(k=1),
    )
    assert found(Net(block)) == ([], [Reason.FUSION])


# --- additions in other words --------------------------------------------------------------------


def added_into_zeros(m: Any, x: Tensor) -> Tensor:
    return torch.add(x, m.body(x), out=torch.empty_like(x))


OTHER_WORDS = {
    "addcmul": lambda m, x: torch.addcmul(x, m.gamma, m.body(x)),
    "addcmul, map first": lambda m, x: torch.addcmul(x, m.body(x), m.gamma),
    "stack.sum": lambda m, x: torch.stack([x, m.body(x)]).sum(0),
    "stack.sum of dim 1": lambda m, x: torch.stack((x, m.body(x)), dim=1).sum(dim=1),
    "sub alpha=-1": lambda m, x: torch.sub(x, m.body(x), alpha=-1),
    "h - (-x)": lambda m, x: m.body(x) - (-x),
    "aten.add": lambda m, x: torch.ops.aten.add.Tensor(x, m.body(x)),
    "sum": lambda m, x: sum([m.body(x), x]),
    "reduce": lambda m, x: functools.reduce(torch.add, [m.body(x), x]),
}


@pytest.mark.parametrize("name", OTHER_WORDS)
def test_an_addition_in_other_words_is_served(name: str) -> None:
    block = Block(OTHER_WORDS[name], body=deep())
    block.gamma = nn.Parameter(torch.full((16, 1, 1), 0.5))
    network = Net(block).eval()
    with torch.no_grad():
        before = network(X)
        plan = plan_se(network, example_input=X)
        assert [s.block for s in plan.sites] == ["block"]
        assert torch.equal(plan.apply()(X), before)
        block.se.fc2.bias.fill_(-1e4)
        torch.testing.assert_close(network(X), network.stem(X))


MIXED = {
    "lerp": lambda m, x: torch.lerp(x, m.body(x), 0.5),
    "mean": lambda m, x: torch.stack([x, m.body(x)]).mean(0),
    "three": lambda m, x: torch.stack([x, m.body(x), x]).sum(0),
    "einsum": lambda m, x: torch.einsum("kbchw->bchw", torch.stack([x, m.body(x)])),
    "_foreach_add": lambda m, x: torch._foreach_add([x], [m.body(x)])[0],
    "index_add": lambda m, x: x.index_add(0, torch.arange(2), m.body(x)),
    "product": lambda m, x: torch.addcmul(x, m.body(x), x),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_maps_that_are_mixed_otherwise_are_not_unsaid(name: str) -> None:
    assert found(Net(Block(MIXED[name], body=deep()))) == ([], [Reason.BLENDED])


def test_an_out_argument_is_not_unsaid() -> None:
    assert found(Net(Block(added_into_zeros, body=deep()))) == ([], [Reason.HIDDEN])


def test_a_mask_made_by_new_empty_is_not_computed_from_the_map() -> None:
    def dropped(m: Any, x: Tensor) -> Tensor:
        h = m.body(x)
        if m.training:
            mask = h.new_empty((h.shape[0], 1, 1, 1)).bernoulli_(0.9)
            h = h * mask / 0.9
        return x + h

    block = Block(dropped, body=deep())
    plan = plan_se(Net(block), example_input=X)
    assert [w.source.name for w in plan.sites[0].where] == ["body", "body"]
    assert same_before_and_after(Net(block), training=True, x=X) == ["block"]
