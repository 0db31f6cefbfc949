"""Blocks that a graph could silently turn into another network, each served rightly or refused."""

import enum
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from blocks import Plain, Root, Unit, X, same_before_and_after
from helpers import randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from se_inject import NoSiteError, Plan, UnsupportedModelError, inject_se, plan_se, se_parameters
from se_inject.models.names import load_model
from se_inject.reasons import Reason
from se_inject.report.count import count_costs


class Body(Unit):
    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


# --- what a graph cannot say -------------------------------------------------------------------


class FrozenPart(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.conv(x)
        return x + self.norm(h)


class Autocast(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + self.body(x)


class AutocastOfDevice(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return x + self.body(x)


class Decorated(Body):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Binary(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(StraightThrough.apply(x))


class Checkpointed(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.body, x, use_reentrant=False)


class CheckpointedByModule(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


class PythonRandom(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x + (random.random() if self.training else 0.5) * self.body(x)


class NumpyRandom(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(numpy.random.rand()) * self.body(x)


class Remembers(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return x + self.last


class Counts(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.n += 1
        return x + self.body(x)


class Caches(Body):
    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(1, device=x.device)
        return x + self.body(x) * self.mask


class Logs(Body):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return x + self.body(x)


class KeepsInADict(Body):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, dict[str, Tensor]] = {"maps": {}}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["maps"]["branch"] = self.body(x)
        return x + self.cache["maps"]["branch"]


class Statistics:
    calls = 0


class CountsElsewhere(Body):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = Statistics()

    def forward(self, x: Tensor) -> Tensor:
        self.statistics.calls += 1
        return x + self.body(x)


class MarksItsChild(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.size = x.shape[-1]
        return x + self.body(x)


class ChildsMode(Body):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.body(x), self.drop.p, self.drop.training)


class Returns(Body):
    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(out=x + self.body(x))


class WritesIntoItsArgument(Body):
    def forward(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            x = {"x": x}
        x["x"] = x["x"] + self.body(x["x"])
        return x


class TakesADict(Body):
    def __init__(self, pops: bool) -> None:
        super().__init__()
        self.pops = pops

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch.pop("x") if self.pops else batch["x"]
        return {**batch, "x": x + self.body(x)}


@pytest.mark.parametrize("block", [WritesIntoItsArgument(), TakesADict(True)])
def test_what_a_block_writes_into_its_arguments_is_not_lost(block: nn.Module) -> None:
    root = Root(block, lambda block, x: block({"x": x, "y": x})["x"])
    plan = plan_se(root, example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]
    assert [s.detail.split(", or ")[-1] for s in plan.skipped] == [
        "what it writes into its arguments would be lost"
    ]
    y = root(X)
    assert torch.equal(plan.apply()(X), y)


def test_a_block_that_only_reads_its_dict_is_served() -> None:
    root = Root(TakesADict(False), lambda block, x: block({"x": x, "y": x})["x"])
    assert same_before_and_after(root) == ["plain", "block"]


class Half(float):
    def __repr__(self) -> str:
        return "a half"


class PrintsNoCode(Body):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)) * Half(0.5)


class KeywordOnly(Body):
    def forward(self, x: Tensor, scale: float = 1.0, *, y: Tensor | None) -> Tensor:
        return x + self.body(x) * scale


REFUSED: dict[type[nn.Module], str] = {
    FrozenPart: "switches gradients on or off",
    Autocast: "enters autocast",
    AutocastOfDevice: "enters autocast",
    Decorated: "enters autocast",
    Binary: "calls an autograd.Function",
    Checkpointed: "is checkpointed",
    CheckpointedByModule: "is checkpointed",
    PythonRandom: "draws random numbers outside torch",
    NumpyRandom: "draws random numbers outside torch",
    Remembers: "sets self.last",
    Counts: "sets self.n",
    Caches: "sets self.mask",
    Logs: "changes what self.shapes holds",
    KeepsInADict: "changes what self.cache holds",
    CountsElsewhere: "changes what self.statistics holds",
    MarksItsChild: "changes what self.conv.size holds",
    ChildsMode: "reads the mode of a child",
    Returns: "would change their types",
    PrintsNoCode: "its graph does not run (SyntaxError",
}


def first(block: nn.Module, x: Tensor) -> Tensor:
    out = block(x)
    return out["out"] if isinstance(out, dict) else out


@pytest.mark.parametrize("block", REFUSED)
def test_what_a_graph_cannot_say_is_refused_and_the_rest_is_served(block: type[nn.Module]) -> None:
    states = random.getstate(), repr(numpy.random.get_state())
    plan = plan_se(Root(block(), first), example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]
    assert {s.block for s in plan.skipped} == {"block"}
    assert REFUSED[block] in plan.skipped[0].detail
    assert (random.getstate(), repr(numpy.random.get_state())) == states


class ClearsInTrain(nn.Identity):
    """timm's attention keeps its biases in eval mode, and forgets them when the mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = {"maps": 1}

    def train(self, mode: bool = True) -> Any:
        self.cache = {} if mode else {"maps": 1}
        return super().train(mode)


def test_what_a_change_of_the_mode_changes_is_not_the_forwards() -> None:
    class Block(Body):
        def __init__(self) -> None:
            super().__init__()
            self.part = ClearsInTrain()

        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(self.part(self.body(x)), 0.1, self.training)

    assert same_before_and_after(Root(Block())) == ["plain", "block"]


class ReadsWhatItHolds(Body):
    """The children may keep what they like, and the forward may read what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Logs()
        self.scales = {"branch": [0.5, 1.0], "of": Statistics()}
        self.rest = iter([1])

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scales["branch"][-1] + self.scales["of"].calls
        return x + self.body(F.relu(self.log(x))) * scale


def test_what_is_held_may_be_read_and_children_may_change_their_own() -> None:
    root = Root(ReadsWhatItHolds())
    plan = plan_se(root, example_input=X)
    assert "block" in [site.block for site in plan.sites]
    assert {s.block for s in plan.skipped} == {"block.log"}
    plan.apply()
    root(X)
    root(X)
    assert len(root.block.log.shapes) == 2


class InFloat32(nn.Module):
    """What is on the branch of many attention blocks."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False), torch.autocast(device_type=kind, enabled=False):
            return x.float() * torch.sigmoid(x.float())


def test_a_child_may_switch_autocast_off_for_the_device_of_its_input() -> None:
    root = Root(nn.Sequential(InFloat32(), Plain()))
    functions = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
    plan = plan_se(root, example_input=X)
    assert count_costs(plan).base.macs == 2 * 16 * 16 * 9 * 8 * 8
    assert same_before_and_after(root) == ["plain", "block.1"]
    assert functions == (
        torch.autocast.__init__,
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
    )


NUMBERS = [numpy.sqrt(0.5), numpy.float32(0.3), numpy.float16(0.3), numpy.int64(2)]


class NumpyNumber(Body):
    def __init__(self, number: numpy.generic) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)) * self.number


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
def test_numbers_of_numpy(number: numpy.generic) -> None:
    assert same_before_and_after(Root(NumpyNumber(number))) == ["plain", "block"]


def test_keyword_only_arguments_after_defaults() -> None:
    root = Root(KeywordOnly(), lambda block, x: block(x, y=None))
    blocks = same_before_and_after(root)
    assert "plain" in blocks  # and no SyntaxError


# --- arguments ---------------------------------------------------------------------------------


class Mode(enum.Enum):
    A = 1
    B = 2


class ByEnum(Body):
    def forward(self, x: Tensor, mode: Mode) -> Tensor:
        return x + self.body(x) if mode is Mode.A else x


class ManyTensors(Body):
    def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
        for other in more:
            x = x + self.body(other)
        return x


def test_an_argument_that_cannot_be_checked_refuses_the_block() -> None:
    plan = plan_se(Root(ByEnum(), lambda block, x: block(x, Mode.A)), example_input=X)
    assert "argument 'mode' is a Mode, which may decide its way" in plan.skipped[0].detail


def test_a_longer_list_than_the_recorded_one_is_refused_when_called() -> None:
    root = Root(ManyTensors(), lambda block, x: block(x, [x]))
    assert "block" in same_before_and_after(root)
    with pytest.raises(RuntimeError, match=r"argument 'len\(more\)' was 1"):
        root.block(X, [X, X])


# --- sharing, aliases, layouts -----------------------------------------------------------------


class TwoConvolutions(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm(self.conv(x))))


def test_a_tied_and_an_untied_block_are_not_alike() -> None:
    for tied_first in (True, False):
        blocks = [TwoConvolutions(), TwoConvolutions()]
        tied = blocks[0] if tied_first else blocks[1]
        tied.conv2 = tied.conv
        assert same_before_and_after(nn.Sequential(*blocks)) == ["0", "1"]


class ViewReadAfter(Body):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        head = out[:, :4]
        out += x
        return torch.cat([out, head], 1)


class InPlaceActivation(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        z = F.relu(y, inplace=True)
        z += x
        return torch.cat([z, y], 1)


@pytest.mark.parametrize("block", [ViewReadAfter, InPlaceActivation])
def test_a_map_that_is_read_again_under_another_name(block: type[nn.Module]) -> None:
    root = Root(block())
    assert same_before_and_after(root) == ["plain"]
    (skipped,) = [s for s in plan_se(Root(block()), example_input=X).skipped if s.block == "block"]
    assert skipped.reason == Reason.SHARED_IN_PLACE


class Relayout(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).contiguous() + x


def test_the_memory_layout_of_the_sum_is_kept() -> None:
    x = torch.randn(2, 9, 7, 16).permute(0, 3, 1, 2)
    block = Relayout().eval()
    before = block(x)
    after = inject_se(block, example_input=x)(x)
    assert torch.equal(before, after)
    assert before.stride() == after.stride()


# --- which operand is the branch ---------------------------------------------------------------


class Parallel(Body):
    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) + self.point(x)


def test_the_identity_in_a_sum_of_three_is_never_scaled() -> None:
    plan = plan_se(Root(Parallel()), example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]
    assert [(s.block, s.reason) for s in plan.skipped] == [("block", Reason.FUSION)] * 2


class DeepParallel(TwoConvolutions):
    """One operand of the last addition is deeper, and holds the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv2(F.relu(self.norm(self.conv(x))))) + self.point(x)


class Interpolates(Body):
    """EfficientViM: x + a * (f(x) - x), where the branch takes the identity away."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * (self.body(x) - x)


@pytest.mark.parametrize(("block", "additions"), [(DeepParallel, 2), (Interpolates, 1)])
def test_a_branch_that_holds_the_identity_is_never_scaled(
    block: type[nn.Module], additions: int
) -> None:
    plan = plan_se(Root(block()), example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]
    assert [(s.block, s.reason) for s in plan.skipped] == [("block", Reason.FUSION)] * additions


class ParallelBranch(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.body(x) + self.point(x))


def test_a_sum_of_branches_is_scaled_as_one() -> None:
    root = Root(ParallelBranch())
    assert same_before_and_after(root).count("block") == 1
    block = root.block
    with torch.no_grad():
        block.se.fc2.bias.fill_(1.0)
        gate = 2 * torch.sigmoid(torch.tensor(1.0))
        expected = X + gate * (block.body(X) + block.point(X))
        torch.testing.assert_close(block(X), expected)


class AcrossModes(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.body(x)
            return x + self.point(x)
        x = x + self.point(x)
        return x + self.body(x)


def test_sites_are_never_crossed_between_the_modes() -> None:
    plan = plan_se(Root(AcrossModes()), example_input=X)
    assert {s.reason for s in plan.skipped} == {Reason.MODES_DIFFER}


# --- gates and norms ---------------------------------------------------------------------------


class InstanceNormByHand(Body):
    def forward(self, x: Tensor) -> Tensor:
        u = self.conv(x)
        u = u * torch.rsqrt(u.pow(2).mean((2, 3), keepdim=True) + 1e-5)
        return x + u


class Contiguous(Body):
    def forward(self, x: Tensor) -> Tensor:
        u = self.body(x)
        return x + u * torch.sigmoid(u.mean((2, 3), keepdim=True)).expand_as(u).contiguous()


class Upsampled(Body):
    def forward(self, x: Tensor) -> Tensor:
        u = self.body(x)
        s = torch.sigmoid(F.adaptive_avg_pool2d(u, 1))
        return x + u * F.interpolate(s, size=u.shape[-2:])


class Einsum(Body):
    def forward(self, x: Tensor) -> Tensor:
        u = self.body(x)
        return x + torch.einsum("nchw,nc->nchw", u, torch.sigmoid(u.mean((2, 3))))


def test_a_norm_by_hand_is_no_gate() -> None:
    assert "block" in same_before_and_after(Root(InstanceNormByHand()))


@pytest.mark.parametrize("block", [Contiguous, Upsampled, Einsum])
def test_gates_in_other_spellings_are_gates(block: type[nn.Module]) -> None:
    plan = plan_se(Root(block()), example_input=X)
    assert [(s.block, s.reason) for s in plan.skipped] == [("block", Reason.GATED)]


def test_gates_on_maps_of_one_position_are_gates() -> None:
    with pytest.raises(NoSiteError, match="16 x the branch already has channel attention"):
        plan_se(load_model("seresnet50", meta=True), example_input=torch.empty(2, 3, 32, 32))


def test_activations_on_maps_of_one_position_are_no_gates() -> None:
    class Swish(Body):
        def forward(self, x: Tensor) -> Tensor:
            u = self.body(x)
            return x + u * torch.sigmoid(u)

    plan = plan_se(Root(Swish()), example_input=torch.empty(2, 16, 1, 1))
    assert {site.block for site in plan.sites} == {"plain", "block"}


# --- modules and models of other habits --------------------------------------------------------


def test_a_train_method_that_returns_nothing() -> None:
    class Mmdet(Plain):
        def train(self, mode: bool = True) -> None:
            super().train(mode)

    assert len(plan_se(Mmdet(), example_input=X).sites) == 1


def test_a_block_called_with_two_widths_is_left_alone() -> None:
    class Slim(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            c = x.shape[1]
            return x + F.conv2d(x, self.weight[:c, :c])

    plan = plan_se(Root(Slim(), lambda b, x: b(x)[:, :8] + b(x[:, :8])), example_input=X)
    assert ("block", Reason.WIDTHS) in [(s.block, s.reason) for s in plan.skipped]


def test_complex_maps_are_left_alone() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1, dtype=torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.complex(x, x)
            return (z + self.conv(z)).real

    plan = plan_se(Root(Complex()), example_input=X)
    assert ("block", Reason.NO_MAP) in [(s.block, s.reason) for s in plan.skipped]


def test_an_image_without_batch_still_works() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Sum()).eval()
    x = torch.randn(3, 12, 12)
    before = model(x)
    assert torch.equal(before, inject_se(model)(x))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_weights_made_in_inference_mode_can_learn() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Sum())
    with torch.inference_mode():
        inject_se(model)
    assert not any(p.is_inference() for p in se_parameters(model))


def test_a_class_that_cannot_be_subclassed_is_named() -> None:
    class Strict(Plain):
        def __init_subclass__(cls, /, name: str) -> None:
            super().__init_subclass__()

    model = Root(Strict())
    keys = list(model.state_dict())
    with pytest.raises(
        UnsupportedModelError, match=r"Strict cannot be subclassed .*exclude='block'"
    ):
        inject_se(model, example_input=X)
    assert list(model.state_dict()) == keys


def test_a_plan_for_a_block_that_was_replaced_is_refused() -> None:
    root = Root(Plain())
    plan = plan_se(root, example_input=X)
    root.block = TwoConvolutions()
    with pytest.raises(UnsupportedModelError, match="'block' was replaced or injected since"):
        plan.apply()


def test_plans_of_several_threads_are_alike() -> None:
    from concurrent.futures import ThreadPoolExecutor

    zeros = torch.zeros

    def count(_: int) -> int:
        plan: Plan = plan_se(load_model("test_resnet", meta=True))
        return len(plan.sites)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(count, range(6))) == [4] * 6
    assert torch.zeros is zeros


@pytest.mark.parametrize("build", [lambda: Root(Plain()), lambda: Root(Parallel())])
def test_these_checks_see_a_wrong_answer(build: Callable[[], nn.Module]) -> None:
    """The comparison that this file relies on can fail."""
    root = randomize(build()).eval()
    with torch.no_grad():
        before = root(X)
        inject_se(root, example_input=X)
        for p in se_parameters(root):
            p.fill_(0.1)
        assert not torch.equal(before, root(X))


# --- shrunk failures of test_random_networks.py --------------------------------------------------


class LeavesChannelsLast(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) + x


class LongSkip(nn.Module):
    """The sum has the memory format of its first operand, and what follows rounds accordingly."""

    def __init__(self, *, shortcut_first: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = LeavesChannelsLast()
        self.shortcut_first = shortcut_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x)
        y = x + y if self.shortcut_first else y + x
        return y.mean((2, 3))


@pytest.mark.parametrize("shortcut_first", [False, True])
def test_a_sum_keeps_its_memory_format(shortcut_first: bool) -> None:
    model = randomize(LongSkip(shortcut_first=shortcut_first))
    x = torch.randn(2, 3, 9, 9)
    assert same_before_and_after(model, x=x) == ["", "block"]
    y = model.stem(x)
    last = model.block(y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    summed = model.se(last, y, residual_first=shortcut_first)
    assert summed.stride() == (y + last if shortcut_first else last + y).stride()


class ReshapedThenDropped(Unit):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return F.dropout(tokens.transpose(1, 2).reshape(x.shape), 0.1, self.training) + x


def test_channels_lost_in_a_reshape_are_those_of_the_shortcut() -> None:
    assert same_before_and_after(Root(ReshapedThenDropped())) == ["plain", "block"]


class ThroughTokens(Unit):
    """Both operands come out of a reshape, of [N, C, positions] and of [N, positions, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.fc(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        out = self.norm(self.conv(shortcut))
        out = self.fc(out.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8))
        return shortcut + out


def test_channels_are_followed_through_reshapes_that_leave_them_whole() -> None:
    plan = plan_se(Root(ThroughTokens()), example_input=X)
    assert [(site.block, site.channels) for site in plan.sites] == [("plain", 16), ("block", 16)]
    assert same_before_and_after(Root(ThroughTokens())) == ["plain", "block"]
