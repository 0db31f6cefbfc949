"""Planning changes nothing: not the user's model, not torch, not what other threads do."""

import contextlib
import cProfile
import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from blocks import Plain, Root, X
from torch import Tensor, nn

from se_inject import NoSiteError, SEInjectError, inject_se, plan_se
from se_inject.graph.meta import on_meta
from se_inject.graph.thread import THREAD
from se_inject.graph.tracing.tracer import BlockTracer
from se_inject.torch_private import function_modes, torch_function_state

NAMES = (
    "test_resnet",
    "test_convnext",
    "test_byobnet",
    "test_efficientnet",
    "dla34",
    "mobilevit_xxs",
)


def state_of(model: nn.Module) -> Iterator[Any]:
    """All that could change: flags, tensors with their versions, hooks, attributes, classes."""
    for name, module in model.named_modules():
        yield name, id(module), type(module), module.training
        for key, value in vars(module).items():
            if isinstance(value, dict):
                yield name, key, [(k, id(v)) for k, v in value.items()]
            else:
                yield name, key, id(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, id(tensor), tensor._version, tensor.data_ptr(), tensor.requires_grad
        yield tensor.device, tensor.dtype, tensor.detach().double().sum().item()


def torch_state() -> list[Any]:
    names = ("__call__", "__getattr__", "__setattr__", "training")
    functions = [torch.arange, torch.full, torch.linspace, torch.autocast.__init__]
    modes = [*function_modes(), torch_function_state()]
    modes += [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    return [*(vars(nn.Module).get(name) for name in names), *functions, *modes, sys.getprofile()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "torchvision/googlenet"])
def test_a_dry_run_over_the_zoo_changes_nothing(name: str, training: bool) -> None:
    if name.startswith("torchvision/"):
        model: nn.Module = torchvision.models.googlenet(init_weights=False)
    else:
        model = timm.create_model(name)
    model.train(training)
    seen: list[Any] = []
    next(model.children()).register_forward_hook(lambda *_: seen.append(1))
    before, of_torch = list(state_of(model)), torch_state()
    with contextlib.suppress(NoSiteError):
        plan_se(model)
    assert list(state_of(model)) == before
    assert torch_state() == of_torch
    assert not seen


# --- forwards that hold on to the user's own modules ---------------------------------------------


def closure(root: Any) -> None:
    old = root.block.forward
    root.block.forward = lambda x: old(x)


def closure_over_the_module(root: Any) -> None:
    block = Plain().train()
    block.load_state_dict(root.block.state_dict())
    root.spare = [block]  # a list, so that it is no child; the copy has one of its own
    root.block.forward = lambda x: block(x)


def closure_over_weights(root: Any) -> None:
    block = root.block
    root.block.forward = lambda x: x + torch.conv2d(x, block.conv.weight, padding=1)


@pytest.mark.parametrize("patch", [closure, closure_over_weights])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_a_closure_over_the_original_module_runs_its_copy(patch: Any, norm: Any) -> None:
    root = Root(Plain()).train()
    root.block.norm = norm(16)
    root.block.conv = torch.nn.utils.parametrizations.spectral_norm(root.block.conv)
    root.block.conv(X)
    patch(root)
    seen: list[int] = []
    root.block.norm.register_forward_hook(lambda *_: seen.append(1))
    before = list(state_of(root))
    plan = plan_se(root, example_input=X)
    assert [s.block for s in plan.sites] == ["plain"]
    assert [(s.block, s.detail) for s in plan.skipped] == [
        ("block", "its forward is replaced on the instance")
    ]
    assert list(state_of(root)) == before
    assert not seen


def test_a_closure_that_writes_to_the_original_module_stops_there() -> None:
    root = Root(Plain())
    block = root.block

    def forward(x: Tensor) -> Tensor:
        block.last = x
        return x + block.conv(x)

    block.forward = forward
    with pytest.raises(SEInjectError, match=r"'block' failed .*sets 'last' of your own Plain"):
        plan_se(root, example_input=X)
    assert not hasattr(block, "last")


class Shared(Plain):
    def __deepcopy__(self, memo: Any) -> "Shared":
        return self


def test_a_block_that_copies_to_itself_is_served_and_keeps_its_mode() -> None:
    root = Root(Shared()).train()
    before = list(state_of(root))
    plan = plan_se(root, example_input=X)
    assert list(state_of(root)) == before
    assert [s.block for s in plan.sites] == ["plain", "block"]
    root.eval()
    y = root(X)
    assert torch.equal(plan.apply()(X), y)


# --- hooks of the model's own --------------------------------------------------------------------

STORE: dict[str, Any] = {}


class Captures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(16, 16, 1), Plain(), nn.Conv2d(16, 4, 1)
        self.captured: list[Tensor] = []
        self.block.register_forward_hook(self.capture)
        self.block.register_forward_hook(lambda m, a, o: STORE.__setitem__("mid", o))

    def capture(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.captured.append(output)

    def forward(self, x: Tensor) -> Tensor:
        self.block(self.stem(x))
        return self.head(self.captured.pop() + STORE.pop("mid"))


@pytest.mark.parametrize("ran", [False, True])
def test_hooks_that_the_forward_needs_are_kept(ran: bool) -> None:
    model = Captures().eval()
    if ran:
        model(X)
    before = list(state_of(model))
    plan = plan_se(model, example_input=X)
    assert "block" in [s.block for s in plan.sites]
    assert list(state_of(model)) == before
    y = model(X)
    assert torch.equal(plan.apply()(X), y)


# --- threads and interruptions -------------------------------------------------------------------


def test_the_trial_of_a_block_seeds_no_device_that_was_not_used_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``torch.manual_seed`` would be carried out again when CUDA starts, over the user's seed."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a foreign device was seeded")

    for module in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(module, "manual_seed", refuse)
        if hasattr(module, "manual_seed_all"):
            monkeypatch.setattr(module, "manual_seed_all", refuse)
    plan_se(nn.Sequential(Plain()), example_input=X).apply()


def test_blocks_in_blocks_do_not_run_again_at_each_level() -> None:
    """Each level of nesting once ran all that is in it three times."""

    class Counted(nn.Conv2d):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    class Level(nn.Module):
        def __init__(self, inner: nn.Module, number: int) -> None:
            super().__init__()
            self.inner, self.number = inner, number
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(self.inner(x))

    network: nn.Module = Counted(8, 8, 3, padding=1)
    for number in range(6):
        network = Level(network, number)
    plan = plan_se(nn.Sequential(network), r=8, example_input=torch.randn(2, 8, 8, 8))
    assert len(plan.sites) == 6
    assert Counted.calls <= 1 + 6  # the recording, and once a level


def test_another_threads_models_go_on_and_are_not_traced() -> None:
    model, other = timm.create_model("test_resnet"), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    x, counts, done = torch.randn(1, 3, 8, 8), Counter[str](), threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                fresh = nn.Dropout(0.5)
                fresh.training = torch.arange(2).shape[0] == 2 and fresh.training
                counts[type(fresh(other(x))).__name__] += 1
            except Exception as error:
                counts[repr(error)] += 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            plan_se(model)
    finally:
        done.set()
        thread.join()
    assert set(counts) == {"Tensor"}


def interrupted_at(line: int, code: Any) -> Any:
    """A trace function that raises KeyboardInterrupt at the n-th line of some functions."""
    count = 0

    def follow(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(code):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return follow

    return follow


FILES = (
    "tracing/patches.py",
    "graph/trace.py",
    "tracing/watch.py",
    "graph/meta.py",
    "graph/copies.py",
)
FILES += ("tracing/replaced.py", "graph/thread.py", "graph/thread_state.py", "torch_private.py")


@pytest.mark.parametrize("part", range(4))
def test_ctrl_c_at_any_line_leaves_torch_as_it_was(part: int) -> None:
    model = nn.Sequential(Plain()).train()
    plan_se(model, example_input=X)
    before, of_torch = list(state_of(model)), torch_state()
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return counted if frame.f_code.co_filename.endswith(FILES) else None

    sys.settrace(counted)
    plan_se(model, example_input=X)
    sys.settrace(None)
    interrupted = 0
    # The first and last lines are those that replace and put back; the others are many.
    lines = [*range(1, 40), *range(count - 60, count), *range(40, count - 60, max(1, count // 60))]
    for line in lines[part::4]:
        sys.settrace(interrupted_at(line, FILES))
        try:
            plan_se(model, example_input=X)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert torch_state() == of_torch, line
        assert THREAD.tracer is None, line
        assert not THREAD.modules, line
    assert interrupted > 20
    assert list(state_of(model)) == before
    assert len(plan_se(model, example_input=X).sites) == 1


def test_ctrl_c_while_a_context_is_entered_or_left() -> None:
    """A ``with`` block does not put back what its own ``__enter__`` or ``__exit__`` leaves."""
    model, before, of_torch = nn.Sequential(Plain()), [0.0, 1.0], torch_state()
    random.seed(5)
    of_random = random.getstate()
    codes = [getattr(on_meta, name).__code__ for name in ("__enter__", "__exit__")]
    for line in range(1, 60):
        count = 0

        def follow(frame: Any, event: str, argument: Any, line: int = line) -> Any:
            nonlocal count
            inside = frame
            while inside is not None and inside.f_code not in codes:
                inside = inside.f_back
            if inside is None:
                return None
            count += event in ("line", "return")
            if count == line:
                count += 1
                raise KeyboardInterrupt
            return follow

        sys.settrace(follow)
        try:
            plan_se(model, example_input=X)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert torch_state() == of_torch, line
        assert random.getstate() == of_random, line
    assert torch.tensor(before).tolist() == before  # on the CPU, and not on meta


def test_ctrl_c_in_a_context_that_ends_only_with_its_frames() -> None:
    """torch takes a mode from the stack for a moment, in a generator, and pushes it again."""

    class Pops(Plain):
        def forward(self, x: Tensor) -> Tensor:
            with torch.overrides._pop_mode_temporarily():
                h = self.norm(self.conv(x))
            return x + h

    of_torch, line, stopped = torch_state(), -2, True
    close = contextlib._GeneratorContextManager.__exit__.__code__
    while stopped and line < 60:  # a step that meets each line of __exit__ in one call or another
        line, count, stopped = line + 3, 0, False

        def follow(frame: Any, event: str, argument: Any, line: int = line) -> Any:
            nonlocal count
            if frame.f_code is not close:
                return None
            count += event == "line"
            if count == line and event == "line":
                raise KeyboardInterrupt
            return follow

        sys.settrace(follow)
        try:
            plan_se(nn.Sequential(Pops(), Plain()), example_input=X)
        except KeyboardInterrupt:
            stopped = True
        finally:
            sys.settrace(None)
        assert torch_state() == of_torch, line
    assert line > 40


def test_a_model_is_planned_under_a_profiler() -> None:
    profiler, seen = cProfile.Profile(), list[str]()
    profiler.enable()
    try:
        plan = plan_se(nn.Sequential(Plain()), example_input=X)
        X.sum()  # the profiler goes on
    finally:
        profiler.disable()
    assert len(plan.sites) == 1
    assert any("sum" in str(entry.code) for entry in profiler.getstats())
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    try:
        plan = plan_se(nn.Sequential(Plain()), example_input=X)
        seen.clear()
        X.sum()
    finally:
        sys.setprofile(None)
    assert len(plan.sites) == 1
    assert seen


class Swallows(Plain):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x + self.norm(self.conv(x))
        except BaseException as error:
            raise RuntimeError("something went wrong") from error


def test_an_interruption_that_became_another_error_is_no_site_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Root(Swallows())
    real = BlockTracer.call_module

    def call_module(self: Any, module: nn.Module, *args: Any) -> Any:
        if isinstance(module, nn.BatchNorm2d) and self.name == "block":
            raise KeyboardInterrupt
        return real(self, module, *args)

    monkeypatch.setattr(BlockTracer, "call_module", call_module)
    with pytest.raises(KeyboardInterrupt):
        plan_se(root, example_input=X)


# --- children that are no Python -----------------------------------------------------------------


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = torch.ao.quantization
        part = nn.Sequential(q.QuantStub(), nn.Conv2d(16, 16, 1), nn.ReLU(), q.DeQuantStub()).eval()
        part.qconfig = q.get_default_qconfig("x86")
        q.prepare(part, inplace=True)
        part(X)
        return q.convert(part)


@pytest.mark.parametrize("make", [lambda: scripted(Plain()), quantized], ids=["script", "quant"])
def test_a_child_that_is_no_float_python_is_skipped_and_the_rest_served(make: Any) -> None:
    root = Root(nn.Sequential(make(), Plain())).eval()
    y = root(X)
    plan = plan_se(root, example_input=X)
    assert [s.block for s in plan.sites] == ["plain", "block.1"]
    assert any(s.block.startswith("block.0") and s.detail for s in plan.skipped)
    plan.apply()
    assert torch.equal(root(X), y)


def test_a_model_that_is_scripted_itself_is_refused() -> None:
    with pytest.raises(SEInjectError, match="is TorchScript"):
        inject_se(scripted(Plain()), example_input=X)


# --- what is not served is said ------------------------------------------------------------------


class ByDevice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + (0.5 if x.is_cuda else 1.0) * self.norm(self.conv(x))


def test_inject_se_warns_in_one_line_and_strict_is_an_error() -> None:
    text = r"1 of 2 residual blocks have no SE block: cannot be traced. See plan_se"
    with pytest.raises(SEInjectError, match=text):
        inject_se(Root(ByDevice()), example_input=X, strict=True)
    with pytest.warns(UserWarning, match=text):
        inject_se(Root(ByDevice()), example_input=X)
    inject_se(Root(Plain()), example_input=X, strict=True)
    inject_se(Root(ByDevice()), example_input=X, strict=True, exclude="block")
