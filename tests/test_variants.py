"""The paper's variants against references written from their formulas."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from blocks import Plain, Root, same_before_and_after
from helpers import open_gates, randomize
from test_sites import SITES, Net
from timm.layers import LayerNorm2d
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.nfnet import GammaAct
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from se_inject import (
    ArgumentError,
    NoSiteError,
    SqueezeExcite,
    inject_se,
    plan_se,
    remove_se,
)
from se_inject.layers.gates import GATES, Gate, Init
from se_inject.layers.layout import IMAGES, Layout
from se_inject.layers.squeezes import SQUEEZES, Squeeze
from se_inject.layers.variant import Variant
from se_inject.models.names import load_model
from se_inject.reasons import Reason
from se_inject.sites.placements import Placement

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Options = dict[str, Any]

# --- the reference: the paper's formulas, and three blocks with every placement ----------------

GATE_FORMULAS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("sigmoid", "paper"): lambda z: 1 / (1 + torch.exp(-z)),
    ("sigmoid", "identity"): lambda z: 2 / (1 + torch.exp(-z)),
    ("tanh", "paper"): lambda z: (1 - torch.exp(-2 * z)) / (1 + torch.exp(-2 * z)),
    ("tanh", "identity"): lambda z: 2 / (1 + torch.exp(-2 * z)),
    ("relu", "paper"): lambda z: torch.where(z > 0, z, 0),
    ("relu", "identity"): lambda z: torch.where(z > -1, z + 1, 0),
    ("hard_sigmoid", "paper"): lambda z: (z / 6 + 0.5).clamp(0, 1),
    ("hard_sigmoid", "identity"): lambda z: (z / 3 + 1).clamp(0, 2),
}
SQUEEZE_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]),
    "max": lambda x: x.flatten(2).max(2).values[:, :, None, None],
    "none": lambda x: x,
}


def se_formula(layer: SqueezeExcite, x: Tensor, options: Options) -> Tensor:
    """Eq. 2 to 4 of the paper; a missing bias is 0."""
    z = SQUEEZE_FORMULAS[options["squeeze"]](x)
    w1, w2 = layer.fc1.weight.flatten(1), layer.fc2.weight.flatten(1)
    b1, b2 = (0 if fc.bias is None else fc.bias[:, None, None] for fc in (layer.fc1, layer.fc2))
    h = torch.einsum("oc,nchw->nohw", w1, z) + b1
    h = torch.einsum("oc,nchw->nohw", w2, h * (h > 0)) + b2
    return x * GATE_FORMULAS[options["gate"], options["init"]](h)


def bottleneck(m: nn.Module, x: Tensor, at: Callable[[str, Tensor], Tensor]) -> Tensor:
    h = F.relu(m.bn1(m.conv1(at("pre", x))))
    h = F.relu(at("3x3", m.bn2(m.conv2(h))))
    h = at("standard", m.bn3(m.conv3(h)))
    return at("post", F.relu(h + at("identity", m.downsample(x))))


def basic(m: nn.Module, x: Tensor, at: Callable[[str, Tensor], Tensor]) -> Tensor:
    h = F.relu(m.bn1(m.conv1(at("pre", x))))
    h = at("standard", at("3x3", m.bn2(m.conv2(h))))
    return at("post", F.relu(h + at("identity", x)))


def inverted(m: nn.Module, x: Tensor, at: Callable[[str, Tensor], Tensor]) -> Tensor:
    """MobileNetV3 has its SE block behind the depthwise convolution, its norm and activation."""
    h = m.bn1(m.conv_pw(at("pre", x)))
    h = at("3x3", m.bn2(m.conv_dw(h)))
    h = at("standard", m.bn3(m.conv_pwl(h)))
    return at("post", h + at("identity", x))


def downsampling() -> Bottleneck:
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return Bottleneck(16, 8, stride=2, downsample=shortcut)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "Bottleneck": (downsampling, bottleneck),
    "BasicBlock": (lambda: BasicBlock(16, 16), basic),
    "InvertedResidual": (lambda: InvertedResidual(16, 16, exp_ratio=2.0), inverted),
}
SE_NAMES = {"InvertedResidual": "se_inject"}  # an Identity of timm's has the name
VARIANTS = [
    {"squeeze": squeeze, "gate": gate, "bias": bias, "init": init}
    for squeeze, gate, bias, init in itertools.product(
        SQUEEZES, GATES, (True, False), get_args(Init)
    )
]


def text(options: Options) -> str:
    return "-".join(map(str, options.values()))


def with_block(name: str) -> Root:
    model = Root(BLOCKS[name][0]()).double()
    return randomize(model)


@pytest.mark.parametrize("options", VARIANTS, ids=text)
def test_a_block_alone_is_the_formula(options: Options, device: str) -> None:
    se = SqueezeExcite(24, 8, **options, device=device, dtype=torch.float64)
    torch.nn.init.normal_(se.fc2.weight)
    x, residual = torch.randn(2, 2, 24, 7, 5, device=device, dtype=torch.float64).requires_grad_()
    expected, actual = residual + se_formula(se, x, options), se(x, residual)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(se(x), se_formula(se, x, options), rtol=1e-12, atol=1e-12)
    assert (se.fc1.bias is None) == (se.fc2.bias is None) == (not options["bias"])
    inputs = (x, residual, *se.parameters())
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        rtol=1e-6,  # torch's own hardsigmoid divides by a 6 of less precision in its backward
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "options", [v for v in VARIANTS if v["bias"] == (v["init"] == "paper")], ids=text
)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_and_gradients_are_those_of_the_formula(
    block: str, placement: Placement, options: Options
) -> None:
    model = with_block(block)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    forward = BLOCKS[block][1]
    inject_se(model, 4, example_input=x, include="block", placement=placement, divisor=4, **options)
    open_gates(model)
    se = model.block.get_submodule(SE_NAMES.get(block, "se"))

    def at(where: str, x: Tensor) -> Tensor:
        return se_formula(se, x, options) if where == placement else x

    def run(block: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        out = block(model.plain(inputs))
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad((out * weights).sum(), [inputs, *model.parameters()])
        return [out, *grads]

    torch.testing.assert_close(
        run(model.block), run(lambda x: forward(model.block, x, at)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_variant_starts_at_the_function_of_the_base(
    placement: Placement, squeeze: Squeeze, gate: Gate, training: bool
) -> None:
    # The Bottleneck comes last: it has other channels than it reads.
    blocks = [randomize(build()) for build, _ in list(BLOCKS.values())[::-1]]
    model = Root(nn.Sequential(*blocks)).train(training)
    base = list(model.parameters())
    x = torch.randn(2, 16, 8, 8)

    def run() -> list[Tensor]:
        out = model(x)
        return [out, *torch.autograd.grad(out.square().mean(), base)]

    before = run()
    inject_se(model, example_input=x, placement=placement, squeeze=squeeze, gate=gate)
    assert all(map(torch.equal, run(), before))
    # And it learns from the first step on.
    second = [p for name, p in model.named_parameters() if ".fc2.weight" in name]
    assert all(g.any() for g in torch.autograd.grad(model(x).square().mean(), second))


# --- the block alone ---------------------------------------------------------------------------


def test_the_tables_have_a_row_for_each_name() -> None:
    assert set(GATES) == set(get_args(Gate))
    assert set(SQUEEZES) == set(get_args(Squeeze))
    assert {init for _, init in GATE_FORMULAS} == set(get_args(Init))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_a_new_block_returns_its_input_to_the_bit(
    squeeze: Squeeze, gate: Gate, dtype: torch.dtype, device: str
) -> None:
    se = SqueezeExcite(32, 8, squeeze=squeeze, gate=gate, device=device, dtype=dtype)
    x, residual = torch.randn(2, 2, 32, 7, 7, device=device).to(dtype)
    assert torch.equal(se(x), x)
    assert torch.equal(se(x, residual), residual + x)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_a_block_compiles_and_exports(squeeze: Squeeze, gate: Gate) -> None:
    se = SqueezeExcite(16, 8, squeeze=squeeze, gate=gate, init="paper", bias=False)
    x = torch.randn(2, 16, 5, 5)
    torch._dynamo.reset()
    compiled = torch.compile(se, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), se(x))
    assert torch.equal(torch.export.export(se, (x,)).module()(x), se(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("init", get_args(Init))
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_a_block_is_scripted_copied_and_pickled(squeeze: Squeeze, gate: Gate, init: Init) -> None:
    se = SqueezeExcite(16, 8, squeeze=squeeze, gate=gate, init=init)
    torch.nn.init.normal_(se.fc2.weight)
    x = torch.randn(2, 16, 5, 5)
    for other in (copy.deepcopy(se), pickle.loads(pickle.dumps(se))):
        assert torch.equal(other(x), se(x))
        assert torch.equal(other(x, x.flip(0)), se(x, x.flip(0)))
    scripted = torch.jit.script(se)  # Its layers are convolutions, which round otherwise.
    torch.testing.assert_close(scripted(x), se(x))
    torch.testing.assert_close(scripted(x, x.flip(0)), se(x, x.flip(0)))


@pytest.mark.parametrize("squeeze", ["avg", "max"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_are_products_unless_somebody_could_tell(
    dims: int, bias: bool, squeeze: Squeeze
) -> None:
    se = SqueezeExcite(
        16, 8, layout=Layout(dims + 2, 1), squeeze=squeeze, bias=bias, init="paper"
    ).double()
    x = torch.randn(3, 16, *(5,) * dims, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[list[Tensor], set[str]]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            y = se(x, x.flip(0))
        grads = torch.autograd.grad(y.square().sum(), [x, *se.parameters()])
        return [y, *grads], {event.name for event in profiler.events() or ()}

    products, names = run()
    assert "aten::linear" in names
    assert not any("conv" in name for name in names)
    called: list[Tensor] = []
    for layer in (se.fc1, se.fc2):
        handle = layer.register_forward_hook(lambda _, args, output: called.append(output))
        convolved, names = run()
        handle.remove()
        assert called.pop().shape[2:] == (1,) * dims
        assert not called
        assert "aten::linear" not in names
        torch.testing.assert_close(convolved, products)


def test_layers_that_are_replaced_are_called() -> None:
    se, x = SqueezeExcite(16, 8, init="paper"), torch.randn(2, 16, 5, 5)
    expected = se(x)
    doubled = nn.Sequential(copy.deepcopy(se.fc2))
    with torch.no_grad():
        doubled[0].weight.mul_(2)
        doubled[0].bias.mul_(2)
    other = copy.deepcopy(se)
    other.fc2 = doubled
    assert not torch.allclose(other(x), expected)
    offloaded = copy.deepcopy(se)
    offloaded.fc1.forward = lambda z: torch.zeros(2, 8, 1, 1)  # as accelerate's hooks do it
    torch.testing.assert_close(offloaded(x), x * torch.sigmoid(se.fc2.bias)[:, None, None])
    parametrized = copy.deepcopy(se)
    torch.nn.utils.parametrize.register_parametrization(parametrized.fc1, "weight", Twice())
    assert not torch.allclose(parametrized(x), expected)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


OLD_STATES = {
    "before there were variants": ({"init": "paper", "gate_scale": 1.0}, {"init": "paper"}),
    "when the gate was a name": (
        {"squeeze": "max", "gate": "tanh", "init": "identity"},
        {"squeeze": "max", "gate": "tanh"},
    ),
}


@pytest.mark.parametrize("when", OLD_STATES)
def test_a_block_of_an_old_pickle(when: str) -> None:
    old_state, options = OLD_STATES[when]
    se = SqueezeExcite(16, 8, **options)
    torch.nn.init.normal_(se.fc2.weight)
    state = se.__getstate__()
    del state["squeeze"]
    modules = {name: layer for name, layer in state["_modules"].items() if name != "gate"}
    old = SqueezeExcite.__new__(SqueezeExcite)
    old.__setstate__(state | {"_modules": modules} | old_state)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(old(x), se(x))
    assert old.gate.name == options.get("gate", "sigmoid")


def test_what_is_planned_in_inference_mode_is_planned_alike() -> None:
    root = Root(Refused(relu_on_the_fork))
    with torch.inference_mode():
        plan = plan_se(root, example_input=torch.randn(2, 16, 8, 8), placement="pre")
    assert [s.reason for s in plan.skipped if s.block == "block"] == [Reason.SHARED_IN_PLACE]


@pytest.mark.parametrize("squeeze", ["max", "none"])
@pytest.mark.parametrize("layout", [Layout(4, 3), Layout(5, 1), Layout(5, 4)])
def test_other_layouts_are_the_same_on_a_permuted_map(squeeze: Squeeze, layout: Layout) -> None:
    se, images = (
        SqueezeExcite(16, 8, layout=layout, squeeze=squeeze, init="paper", dtype=torch.float64)
        for layout in (layout, IMAGES)
    )
    state = {k: v.reshape_as(se.state_dict()[k]) for k, v in images.state_dict().items()}
    se.load_state_dict(state)
    x = torch.randn(2, 16, *range(3, layout.ndim + 1), dtype=torch.float64)
    expected = images(x.flatten(3) if layout.ndim == 5 else x).reshape(x.shape)
    actual = se(x.movedim(1, layout.channel_dim)).movedim(layout.channel_dim, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_repr_names_squeeze_and_gate() -> None:
    text = repr(SqueezeExcite(16, 8, squeeze="max", gate="tanh"))
    assert "gate=1 + tanh, squeeze=max" in text


# --- where it goes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "resnetv2_50",
        "mobilenetv2_035",
        "tf_efficientnet_lite0",
        "test_convnext",
        "dla46x_c",
        "hrnet_w18_small",
        "regnetx_002",
        "resnetblur18",
        "mobilenetv4_conv_small",
    ],
)
def test_real_networks_keep_their_function(name: str) -> None:
    """With every placement in turn: to draw the weights takes as long as all the rest."""
    drop = {} if name.startswith(("dla", "hrnet")) else {"drop_path_rate": 0.3}
    model = randomize(timm.create_model(name, **drop))
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 64, 64)

    @torch.no_grad()
    def run() -> list[Tensor]:
        outputs = []
        for training in (False, True):
            model.train(training)
            model.load_state_dict(state, strict=False)  # train mode moves the statistics
            torch.manual_seed(1)
            outputs.append(model(x))
        return outputs

    before = run()
    for placement in PLACEMENTS[1:]:
        inject_se(model, placement=placement)
        assert all(map(torch.equal, run(), before)), placement
        open_gates(model)
        assert not any(map(torch.equal, run(), before)), placement
        assert all(map(torch.equal, (remove_se(model), run())[1], before)), placement


# Placements that a block has no place for.
NO_PLACE = {("a + b + x", "3x3"), ("x += body", "pre")}


@pytest.mark.parametrize(
    ("name", "placement"),
    [pair for pair in itertools.product(SITES, PLACEMENTS) if pair not in NO_PLACE],
)
def test_hand_written_blocks_keep_their_function(name: str, placement: Placement) -> None:
    build, count = SITES[name]
    model = Net(build()).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        plan = plan_se(model, example_input=x, placement=placement)
        assert len(plan.sites) == count
        assert torch.equal(before, plan.apply()(x))
        for site in plan.sites:
            se = model.get_submodule(site.name)
            se.fc2.bias.fill_(1.0)
            assert not torch.equal(before, model(x)), site.name
            se.fc2.bias.fill_(0.0)
        assert torch.equal(before, remove_se(model)(x))


class Refused(nn.Module):
    """Near-misses: with a copy of the map in its place, somebody would see another value."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.point, self.relu = nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def relu_on_the_fork(m: Any, x: Tensor) -> Tensor:
    return m.body(m.relu(x)) + x


def shortcut_in_place(m: Any, x: Tensor) -> Tensor:
    x += m.body(x)
    return x


def own_shortcut_in_place(m: Any, x: Tensor) -> Tensor:
    """Learns as it is: a ReLU keeps its output for the backward pass, not what it read."""
    x = x * 2
    x += m.body(F.relu(x))
    return x


def sum_of_a_map_in_use(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    out = h + x
    out.relu_()
    return out


def sum_through_another_name(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    h.add_(x)
    return h


def in_place_between(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.body(x))
    kept = h
    h = m.point(m.relu(h))
    return h + x + 0 * kept.mean()


IN_PLACE: list[tuple[Callable[..., Tensor], Placement, Reason | None]] = [
    (relu_on_the_fork, "pre", Reason.SHARED_IN_PLACE),
    (relu_on_the_fork, "post", None),
    (shortcut_in_place, "pre", Reason.SHARED_IN_PLACE),
    (shortcut_in_place, "post", Reason.SHARED_IN_PLACE),
    (shortcut_in_place, "identity", Reason.SHARED_IN_PLACE),
    (own_shortcut_in_place, "pre", Reason.SHARED_IN_PLACE),
    (own_shortcut_in_place, "post", None),
    (own_shortcut_in_place, "identity", None),
    (sum_of_a_map_in_use, "post", None),
    (sum_through_another_name, "post", Reason.SHARED_IN_PLACE),
    (in_place_between, "3x3", None),
]


@pytest.mark.filterwarnings(
    "ignore:.*residual blocks have no SE block"
)  # said of those that are skipped
@pytest.mark.parametrize(
    ("forward", "placement", "reason"), IN_PLACE, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_operations_in_place(
    forward: Callable[..., Tensor], placement: Placement, reason: Reason | None
) -> None:
    root = Root(Refused(forward), lambda block, x: torch.cat([block(x).relu_(), x], 1))
    x = torch.randn(2, 16, 8, 8)
    plan = plan_se(root, example_input=x, placement=placement)
    assert ([s.reason for s in plan.skipped if s.block == "block"] or [None]) == [reason]
    could_learn = can_learn(root, x)
    with torch.no_grad():
        before = root(x.clone())  # also what the caller sees of its own map
        inject_se(root, example_input=x, placement=placement)
        assert torch.equal(root(x.clone()), before)
    assert can_learn(root, x) == could_learn


def can_learn(model: nn.Module, x: Tensor) -> bool:
    """Whether all that the backward pass needs is as the forward has left it."""
    try:
        model(x.clone()).sum().backward()
    except RuntimeError:
        return False
    return True


class TwoArguments(Plain):
    """The shortcut comes from the caller, as in DLA."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + shortcut


class TwoBranchInputs(Plain):
    def forward(self, x: Tensor, y: Tensor, shortcut: Tensor) -> Tensor:
        return self.norm(self.conv(x * y)) + shortcut


class Inverted(nn.Module):
    """With a norm that is frozen, or none and a gain on the activation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.act, self.project = norm, nn.ReLU6(), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.act(self.norm(self.conv(x))))


class Gained(Inverted):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.conv, self.act = nn.Conv2d(16, 16, 3, padding=1), GammaAct("relu", 1.7)


@pytest.mark.parametrize(
    ("block", "source"),
    [
        (Inverted(nn.BatchNorm2d(16)), "act"),
        (Inverted(FrozenBatchNorm2d(16)), "act"),
        (Inverted(nn.Identity()), "act"),
        (Inverted(LayerNorm2d(16)), "act"),
        (Gained(), "conv"),  # no norm, and no depthwise convolution
    ],
    ids=["norm", "frozen norm", "no norm", "layer norm", "gain"],
)
def test_3x3_is_behind_the_norm_whatever_it_is(block: nn.Module, source: str) -> None:
    plan = plan_se(Root(block), example_input=torch.randn(2, 16, 8, 8), placement="3x3")
    assert [str(s.where[0].source) for s in plan.sites if s.block == "block"] == [source]


class DropsItsInput(nn.Module):
    """In train mode the shortcut reads what the branch has dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.conv = nn.Dropout(0.5, inplace=True), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.drop(x)) + x


def test_a_dropout_in_place_on_the_fork_is_seen_in_eval_mode() -> None:
    root = Root(DropsItsInput())
    plan = plan_se(root, example_input=torch.randn(2, 16, 8, 8), placement="pre")
    assert [s.reason for s in plan.skipped if s.block == "block"] == [Reason.SHARED_IN_PLACE]
    assert same_before_and_after(root, training=True) == ["plain", "block"]


def test_pre_takes_the_one_argument_that_the_branch_reads() -> None:
    root = Root(TwoArguments(), lambda block, x: block(x, x.relu()))
    plan = plan_se(root, example_input=torch.randn(2, 16, 8, 8), placement="pre")
    assert [str(s.where[0].source) for s in plan.sites if s.block == "block"] == ["x"]
    assert "block" in same_before_and_after(root)


def test_pre_of_a_unit_and_of_the_long_skip_above_it() -> None:
    """The unit's own block reads what the block of the long skip gives."""
    model = Net(SITES["units under a long skip"][0]()).eval()
    image = torch.randn(2, 3, 16, 16)
    inject_se(model, example_input=image, placement="pre")
    open_gates(model)
    m = model.block
    x = model.stem(image)
    y = m.se3(x)
    h = y + m.body(m.se(y))
    h = h + m.other(m.se2(h))
    torch.testing.assert_close(model(image), x + m.last(h))


def test_pre_is_refused_where_the_branch_reads_two() -> None:
    inputs = tuple(torch.randn(2, 16, 8, 8) for _ in range(3))
    with pytest.raises(NoSiteError) as caught:
        plan_se(TwoBranchInputs(), example_input=inputs, placement="pre")
    assert [s.reason for s in caught.value.skipped] == [Reason.SEVERAL_INPUTS]


SKIPPED: list[tuple[str, str]] = [
    ("res2net50_26w_4s", Reason.SIDE_BY_SIDE),
    ("torchvision/mobilenet_v2", Reason.CONVOLUTION_INSIDE),
    ("levit_conv_128", Reason.NO_SPATIAL),
]


@pytest.mark.parametrize(("name", "reason"), SKIPPED)
def test_3x3_says_why_not(name: str, reason: Reason) -> None:
    with pytest.raises(NoSiteError) as caught:
        plan_se(load_model(name, meta=True), placement="3x3")
    assert reason in {entry.reason for entry in caught.value.skipped}


def test_what_is_skipped_stays_so_for_every_placement() -> None:
    model = load_model("hrnet_w18_small", meta=True)
    skipped = [plan_se(model, placement=placement).skipped for placement in PLACEMENTS]
    assert all(entry == skipped[0] for entry in skipped)


# --- beside networks that have it --------------------------------------------------------------


SHARED = ["1.1", "2.1", "3.1", "3.2", "4.1", "4.2", "5.1", "5.2", "5.3"]


@pytest.fixture(scope="module")
def lite_and_b0() -> tuple[nn.Module, nn.Module]:
    """EfficientNet-Lite0 is B0 without SE (and, here, with the same activation).

    Where the rules differ: B0 has SE in its blocks without a shortcut too, which are no residual
    branches; it counts r from the input of the block, a sixth of the map that is scaled, so its
    r=4 is our r=24; and it names the layers conv_reduce and conv_expand.
    """
    lite = timm.create_model("efficientnet_lite0", act_layer="relu").eval()
    b0 = timm.create_model("efficientnet_b0", act_layer="relu").eval()
    return inject_se(lite, 24, placement="3x3", divisor=1, init="paper"), randomize(b0)


def test_3x3_serves_the_blocks_of_efficientnet_that_have_a_shortcut(
    lite_and_b0: tuple[nn.Module, nn.Module],
) -> None:
    lite, b0 = lite_and_b0
    names = {n.removesuffix(".conv_reduce") for n, _ in b0.named_modules() if "conv_reduce" in n}
    ours = {n.removesuffix("_inject.fc1") for n, _ in lite.named_modules() if "_inject.fc1" in n}
    assert ours < names
    assert sorted(ours) == [f"blocks.{name}.se" for name in SHARED]


@pytest.mark.parametrize("name", SHARED)
def test_3x3_is_where_efficientnet_has_its_own(
    name: str, lite_and_b0: tuple[nn.Module, nn.Module]
) -> None:
    ours, theirs = (model.get_submodule(f"blocks.{name}") for model in lite_and_b0)
    state = {
        k.replace("se.conv_reduce", "se_inject.fc1").replace("se.conv_expand", "se_inject.fc2"): v
        for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(state, strict=True)  # so all shapes are equal
    x = torch.randn(2, theirs.conv_pw.in_channels, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


BAD: list[tuple[Options, str]] = [
    ({"placement": "x"}, "placement='x' is not known; use 'standard', 'pre', 'post', "),
    ({"squeeze": "sum"}, "squeeze='sum' is not known; use 'avg', 'max' or 'none'"),
    ({"gate": None}, "gate=None is not known; use 'sigmoid', 'tanh', 'relu' or 'hard_s"),
    ({"bias": 1}, "bias=1 is neither True nor False"),
    (
        {"bias": False, "se_layer": nn.Identity},
        "bias=False belongs to the SE block, which se_layer",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_value_is_named(options: Options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan_se(load_model("resnet18", meta=True), **options)


def test_the_standard_variant_differs_in_nothing() -> None:
    assert Variant().differing() == {}
    assert Variant(gate="tanh", divisor=1).differing() == {"gate": "tanh"}
