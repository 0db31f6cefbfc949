"""What the tracer must not get wrong in silence, and what it must say where it cannot follow."""

import contextlib
import copy
import inspect
import threading
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from blocks import Plain, Root, Unit, X, same_before_and_after
from torch import Tensor, nn

from se_inject import ForwardError, NoSiteError, SEInjectError, inject_se, plan_se, remove_se
from se_inject.reasons import Reason

# --- forwards that read the mode ---------------------------------------------------------------


class Dropping(Unit):
    """Functional dropout and stochastic depth of one's own, under ``self.training``."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.dropout(self.norm(self.conv(x)), 0.5, self.training)
        if self.training:
            keep = torch.empty(x.shape[0], 1, 1, 1, device=x.device).bernoulli_(0.5)
            out = out * keep
        return x + out


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_reads_the_mode_keeps_both_ways(training: bool) -> None:
    root = Root(Dropping())
    assert "block" in same_before_and_after(root, training)
    # and the other mode, without another injection:
    reference = remove_twin(root)
    for mode in (True, False):
        torch.manual_seed(1)
        a = root.train(mode)(X)
        torch.manual_seed(1)
        b = reference.train(mode)(X)
        assert torch.equal(a, b)


def remove_twin(root: nn.Module) -> nn.Module:
    return remove_se(copy.deepcopy(root))


# --- in place ----------------------------------------------------------------------------------


class InPlaceOnInput(Unit):
    def forward(self, x: Tensor) -> Tensor:
        x += self.norm(self.conv(x))
        return x


def test_an_input_that_was_changed_in_place_is_still_changed() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        out = block(x)
        return torch.stack([out, x])  # the caller sees the sum in both

    assert "block" in same_before_and_after(Root(InPlaceOnInput(), call))


class InPlaceShared(Unit):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.norm(self.conv(x))
        feature = out
        out += x
        return out, feature


def test_a_block_whose_branch_is_read_again_after_it_was_added_to_is_left_alone() -> None:
    root = Root(InPlaceShared(), lambda block, x: torch.stack(block(x)))
    assert same_before_and_after(root) == ["plain"]
    (skipped,) = plan_se(remove_se(root), example_input=X).skipped
    assert (skipped.block, skipped.reason) == ("block", Reason.SHARED_IN_PLACE)


# --- arguments ---------------------------------------------------------------------------------


class ManyArguments(Unit):
    def forward(
        self, x: Tensor, others: list[Tensor], scale: float = 1.0, *, flag: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        out = x + self.norm(self.conv(others[0]))
        if flag:
            out = out * scale
        return out, others


def test_lists_numbers_flags_and_tuple_outputs_pass_through() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        out, (first, second) = block(x, [x * 2, x * 3], 0.5, flag=True)
        return out + first - second

    assert "block" in same_before_and_after(Root(ManyArguments(), call))


def test_a_flag_other_than_the_recorded_one_is_refused_when_called() -> None:
    root = Root(ManyArguments(), lambda block, x: block(x, [x], 0.5, flag=True)[0])
    inject_se(root, example_input=X)
    root.block(X, [X], 0.25, flag=True)  # numbers may change
    with pytest.raises(RuntimeError, match="argument 'flag' was True"):
        root.block(X, [X], 0.5, flag=False)


class Varargs(Unit):
    def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
        return xs[0] + self.norm(self.conv(named["y"]))


def test_varargs() -> None:
    root = Root(Varargs(), lambda block, x: block(x, x, y=x * 2))
    assert "block" in same_before_and_after(root)


class InSize(Unit):
    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return x + F.interpolate(self.norm(self.conv(x)), size=(h, w))


def test_an_edited_forward_serves_other_sizes_than_the_recorded_one() -> None:
    root = Root(InSize()).eval()
    x = torch.randn(1, 16, 12, 20)
    before = root(x)
    inject_se(root, example_input=X)
    assert torch.equal(before, root(x))


# --- residuals in the root ---------------------------------------------------------------------


class AllInOne(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def test_a_residual_in_the_forward_of_the_model_itself() -> None:
    model = AllInOne().eval()
    before = model(X)
    plan = plan_se(model, example_input=X)
    assert [(site.block, site.name) for site in plan.sites] == [("", "se")]
    assert torch.equal(before, plan.apply()(X))
    assert isinstance(model, AllInOne)
    assert {k for k in model.state_dict() if k.startswith("se.")}


def test_a_graph_module_is_named_not_edited() -> None:
    """Its deepcopy and recompile() rebuild the forward from a graph that knows of no SE block."""

    class Traced(nn.Sequential):
        pass

    root = Traced(torch.fx.symbolic_trace(AllInOne().eval()), Plain())
    plan = plan_se(root, example_input=X)
    assert [site.block for site in plan.sites] == ["1"]
    assert [(s.block, s.reason) for s in plan.skipped] == [("0", Reason.UNTRACED)]
    assert "inject into the model that it was traced from" in plan.skipped[0].detail


class Taken(Unit):
    """``se`` is taken by the class, where it would hide a child of the same name."""

    se = None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def test_an_attribute_of_the_class_is_not_taken_for_free() -> None:
    root = Root(Taken())
    assert "block" in same_before_and_after(root)
    assert isinstance(root.block.se_inject, nn.Module)
    assert root.block.se is None


# --- what fx cannot follow ---------------------------------------------------------------------


class ControlFlow(Unit):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.norm(self.conv(x))
        return x


class ShapeControlFlow(Unit):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            return x + self.norm(self.conv(x))
        return x


class TypeControlFlow(Unit):
    """fx follows the wrong way here without a word: a proxy is no Tensor."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            return x + self.norm(self.conv(x))
        return x[0]


class FreshTensor(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)) * torch.full((1,), 2.0, device=x.device)


def test_a_tensor_made_in_the_forward_is_made_in_every_call() -> None:
    root = Root(FreshTensor())
    assert "block" in same_before_and_after(root)
    assert "torch.full(" in inspect.getsource(type(root.block).forward)


class ForeignTensor(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)) * torch.from_numpy(numpy.array(2.0))


class OnTheInstance(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: x + self.norm(self.conv(x))


@pytest.mark.parametrize("block", [ShapeControlFlow, TypeControlFlow])
@pytest.mark.parametrize("training", [False, True])
def test_what_the_recorded_call_answers_is_served(block: type[nn.Module], training: bool) -> None:
    assert same_before_and_after(Root(block()), training) == ["plain", "block"]


def test_another_answer_than_the_recorded_one_is_an_error_that_names_the_question() -> None:
    root = inject_se(Root(ShapeControlFlow()), example_input=X)
    root(torch.randn(3, 16, 6, 5))  # other sizes with the same answer
    with pytest.raises(RuntimeError, match=r"`x.shape\[-1\] > 4` was True .* remove_se"):
        root(X[..., :4])


UNTRACEABLE = {
    ForeignTensor: "uses a tensor that was not made by a function of torch",
    OnTheInstance: "replaced on the instance",
}


@pytest.mark.parametrize("block", UNTRACEABLE)
def test_what_cannot_be_traced_is_named_and_the_rest_is_served(block: type[nn.Module]) -> None:
    root = Root(block())
    plan = plan_se(root, example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]
    (skipped,) = plan.skipped
    assert skipped.block == "block"
    assert skipped.reason == "cannot be traced"
    assert UNTRACEABLE[block] in skipped.detail
    assert same_before_and_after(Root(block())) == ["plain"]


class Indices(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)) * len(x.nonzero())


def test_a_forward_that_needs_shapes_from_values_is_served_until_there() -> None:
    """Detection models stop so on meta; the blocks before the stop are recorded."""
    with pytest.warns(UserWarning, match=r"'block' needs values.*run after that are not planned"):
        plan = plan_se(Root(Indices()), example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]
    (skipped,) = plan.skipped
    assert skipped.reason == "not reached by the recorded forward"
    assert "'block' needs values" in skipped.detail


class AsksForNumber(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean().item() > 0 else self.conv(x)


@pytest.mark.parametrize("block", [ControlFlow, AsksForNumber])
def test_what_runs_after_a_value_was_asked_for_is_served(block: type[nn.Module]) -> None:
    root = nn.Sequential(Root(block()), Plain())
    with pytest.warns(UserWarning, match=r"'0\.block' asks tensors for their values"):
        plan = plan_se(root, example_input=X)
    assert [site.block for site in plan.sites] == ["0.plain", "1"]
    assert ("0.block", "not reached by the recorded forward") in {
        (skipped.block, skipped.reason) for skipped in plan.skipped
    }
    before = root.eval()(X)
    plan.apply()
    assert torch.equal(root(X), before)


class SizeFromValue(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 8 // x.argmax().item())


def test_where_a_guess_leads_astray_the_forward_is_served_until_there() -> None:
    with pytest.warns(UserWarning, match=r"'block' needs values"):
        plan = plan_se(Root(SizeFromValue()), example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]


class WaitsForTrue(Unit):
    def forward(self, x: Tensor) -> Tensor:
        while not x.norm() < 1:
            x = x * 0.5
        return self.conv(x)


def test_a_loop_that_waits_for_another_answer_ends() -> None:
    """Guesses are false or 0 for ever; after a hundred the forward is served until there."""
    with pytest.warns(UserWarning, match=r"'0.block' needs values.*run after that are not planned"):
        plan = plan_se(nn.Sequential(Root(WaitsForTrue()), Plain()), example_input=X)
    assert [site.block for site in plan.sites] == ["0.plain"]


# --- hidden additions, wrong inputs ------------------------------------------------------------


def helper(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) + y


torch.fx.wrap("helper")


class Hidden(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x, self.norm(self.conv(x)))


def test_additions_in_a_function_that_fx_does_not_enter_are_listed() -> None:
    plan = plan_se(Root(Hidden()), example_input=X)
    assert [s.reason for s in plan.skipped] == ["inside a function that fx does not enter"] * 2


@pytest.mark.parametrize("side", [28, 32, 64, 224])
def test_a_network_that_flattens_to_a_fixed_size_needs_no_example(side: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), Plain(), nn.Flatten(), nn.Linear(16 * side * side, 10)
    )
    assert plan_se(model).input_size == [1, side, side]


def test_an_example_may_be_positional_or_named_arguments() -> None:
    class Two(Plain):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.norm(self.conv(y))

    for example in ((X, X), {"x": X, "y": X}, {"y": X, "x": X}):
        assert len(plan_se(Two(), example_input=example).sites) == 1


def test_the_attempt_that_got_furthest_is_reported() -> None:
    """A network for one channel with a bug: not that it rejects three channels."""

    class Bug(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("my own bug")

    with pytest.raises(ForwardError, match=r"'1' failed .* KeyError: 'my own bug'"):
        plan_se(nn.Sequential(nn.Conv2d(1, 16, 3), Bug()))


def test_an_ordinary_error_that_speaks_of_meta_data_is_no_missing_value() -> None:
    class Bug(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("metadata table not loaded")

    with pytest.raises(ForwardError, match="metadata table not loaded"):
        plan_se(nn.Sequential(Plain(), Bug()), example_input=X)


class OnTheCPU(Unit):
    """Tensors that a copy to meta could miss: in a list, and made on a device by name."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(1)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)) * self.scales[0] * torch.ones(1, device="cpu")


def test_tensors_in_lists_and_on_named_devices_do_not_stop_the_recording() -> None:
    assert [s.block for s in plan_se(Root(OnTheCPU()), example_input=X).sites][-1] == "plain"


class Caught(Unit):
    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(KeyError):
            x = self.broken(x)
        return x + self.norm(self.conv(x))

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError

    def __init__(self) -> None:
        super().__init__()
        self.broken = self.Broken()


def test_a_child_that_raises_and_is_caught_does_not_confuse_whose_addition_it_is() -> None:
    plan = plan_se(Root(Caught()), example_input=X)
    assert [site.block for site in plan.sites] == ["plain"]
    assert {s.block for s in plan.skipped} == {"block"}


class Levels(Unit):
    """A child returns a dict of tensors and a list of names, as torchvision's pyramids do."""

    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[dict[str, Tensor], list[str]]:
            return {"a": x * 2, "b": x * 3}, ["a", "b"]

    def __init__(self) -> None:
        super().__init__()
        self.split = self.Split()

    def forward(self, x: Tensor) -> Tensor:
        levels, names = self.split(x)
        out = sum(levels[name] for name in names)
        return x + self.norm(self.conv(out))


def test_containers_that_children_return_can_be_iterated_over() -> None:
    assert "block" in same_before_and_after(Root(Levels()))


def test_planning_leaves_torch_and_the_random_numbers_alone() -> None:
    dropping, untraceable = Root(Dropping()), Root(ShapeControlFlow())
    before, zeros = torch.get_rng_state(), torch.zeros
    plan_se(dropping, example_input=X)
    plan_se(untraceable, example_input=X)
    assert torch.zeros is zeros
    assert "training" not in vars(nn.Module)
    assert torch.equal(before, torch.get_rng_state())


def test_another_thread_is_not_traced() -> None:
    seen: list[type] = []
    done = threading.Event()

    def other() -> None:
        while not done.is_set():
            seen.append(type(torch.zeros(2)))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(5):
            plan_se(Root(Dropping()), example_input=X)
    finally:
        done.set()
        thread.join()
    assert set(seen) == {Tensor}


class MoreInTraining(Unit):
    def forward(self, x: Tensor) -> Tensor:
        out = x + self.norm(self.conv(x))
        if self.training:
            out = out + F.avg_pool2d(out, 3, 1, 1)
        return out


def test_additions_of_train_mode_alone_are_listed() -> None:
    plan = plan_se(Root(MoreInTraining()), example_input=X)
    assert {site.block for site in plan.sites} == {"block", "plain"}
    assert [(s.block, s.detail) for s in plan.skipped] == [("block", "in train mode")]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(2, 3, 8, 8), r"'plain' failed on an input of shape \[2, 3, 8, 8\]"),
        (torch.randn(8), "failed on an input of shape"),
        ((X, X), "the model itself failed"),
    ],
)
def test_a_forward_that_fails_says_where_and_what_to_pass(example: Any, message: str) -> None:
    with pytest.raises(ForwardError, match=message) as caught:
        plan_se(Root(Plain()), example_input=example)
    assert "Pass example_input=" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = Plain()
    model.lock = threading.Lock()
    with pytest.raises(SEInjectError, match=r"copy\.deepcopy of the model fails \(TypeError"):
        plan_se(model, example_input=X)


def test_no_addition_at_all() -> None:
    with pytest.raises(NoSiteError, match="the forward of Sequential adds no two maps"):
        plan_se(nn.Sequential(nn.Conv2d(3, 8, 3)))
