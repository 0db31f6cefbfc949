"""An interruption at any line or bytecode leaves a model injected or a base, never half of each."""

import copy
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import se_inject.api
import se_inject.edit.insert
import se_inject.edit.whole
import se_inject.keep.load
import se_inject.plan.plan
from se_inject import CheckpointError, inject_se, load_se, plan_se, remove_se, save_se
from se_inject.edit.block_class import edit_of

X = torch.randn(2, 4, 6, 6)


class Block(nn.Module):
    """``se`` is None on the instance, as in timm's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.se = None
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class NoneChild(Block):
    """``se`` is None among the children."""

    def __init__(self) -> None:
        super().__init__()
        del self.se
        self.register_module("se", None)


class NoneBuffer(Block):
    """``se`` is None among the buffers."""

    def __init__(self) -> None:
        super().__init__()
        del self.se
        self.register_buffer("se", None)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), Block(), NoneChild(), NoneBuffer()).eval()


def state(model: nn.Module) -> list[Any]:
    """All that an edit can change but the values of tensors: classes, attributes, children."""
    return [
        (
            name,
            type(module),
            {k: v for k, v in vars(module).items() if not isinstance(v, dict)},
            [(k, id(v)) for k, v in module._modules.items()],
            sorted(module._parameters),
            sorted(module._buffers),
        )
        for name, module in model.named_modules()
    ]


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return list(mine) == list(others) and all(torch.equal(mine[k], others[k]) for k in mine)


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line or bytecode that runs in some of our files."""

    def __init__(self, n: int, event: str, modules: tuple[types.ModuleType, ...]) -> None:
        self.n, self.event, self.count = n, event, 0
        self.files = {module.__file__ for module in modules}

    def __call__(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        if event == self.event:
            self.count += 1
            if self.count == self.n:
                raise KeyboardInterrupt
        return self

    def run(self, function: Callable[[], Any]) -> bool:
        """Whether the function was interrupted; other errors go through."""
        old = sys.gettrace()
        # Python 3.12 looks when the trace is set whether any frame asks for bytecodes.
        sys._getframe().f_trace_opcodes = self.event == "opcode"
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(old)
        return False


def moments(event: str, *modules: types.ModuleType, step: int = 1) -> Iterator[Interrupter]:
    """An interrupter for every line, or every 23rd bytecode, until one was not needed.

    ``EVERY_BYTECODE=1`` in the environment takes each of both, which needs minutes. Else ``step``
    says which lines are taken where reading a file comes before each of them.
    """
    every = bool(os.environ.get("EVERY_BYTECODE"))
    step = 1 if every else step
    step = 23 if event == "opcode" and not every else step
    for n in range(1, 20_000, step):
        interrupter = Interrupter(n, event, modules)
        yield interrupter
        if interrupter.count < n:
            assert n > 20  # The function was traced at all.
            return
    raise AssertionError("it never ended")


EDIT = (se_inject.edit.insert, se_inject.edit.whole, se_inject.api)
EVENTS = ["line", "opcode"]


@pytest.fixture
def _edits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check before the edit, which edits copies with the same lines."""
    monkeypatch.setattr(se_inject.plan.plan, "verify", lambda *_: None)


@pytest.mark.usefixtures("_edits_alone")
@pytest.mark.parametrize("event", EVENTS)
def test_apply_interrupted(event: str) -> None:
    model = network()
    plan = plan_se(model, 1, divisor=1, example_input=X)
    before = state(model)
    # Bytecodes are many: those of the edit itself, past the making of layers and classes.
    files = EDIT if event == "line" else EDIT[1:2]
    for interrupter in moments(event, *files):
        if not interrupter.run(plan.apply):
            continue
        if state(model) != before:  # the interruption came when all was done
            assert all(edit_of(block) for block in list(model)[1:])
            remove_se(model)
        assert state(model) == before
    remove_se(model)


@pytest.mark.usefixtures("_edits_alone")
@pytest.mark.parametrize("event", EVENTS)
def test_remove_interrupted(event: str) -> None:
    model = network()
    y, before = model(X), state(model)
    plan = plan_se(model, 1, divisor=1, example_input=X)
    plan.apply()
    injected = state(model)
    for interrupter in moments(event, *EDIT):
        interrupter.run(lambda: remove_se(model))
        assert torch.equal(model(X), y)
        if any(map(edit_of, model.modules())):
            assert state(model) == injected
        else:
            assert state(model) == before
            plan.apply()
            injected = state(model)


@pytest.mark.usefixtures("_edits_alone")
@pytest.mark.parametrize("event", EVENTS)
def test_the_rollback_of_load_se_interrupted(
    event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is bad: an interruption anywhere in the rollback does not stop it."""
    model = network()
    inject_se(model, 1, divisor=1, example_input=X)
    save_se(model, tmp_path / "se.safetensors", extra="0.*")
    base = network()
    with torch.no_grad():
        base[0].weight.add_(1)
    before, twin = state(base), copy.deepcopy(base)
    plan = plan_se(base, 1, divisor=1, example_input=X)
    monkeypatch.setattr(se_inject.keep.load, "plan_again", lambda *_: plan)

    def fill(model: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            model[0].weight.zero_()
        raise CheckpointError("bad")

    monkeypatch.setattr(se_inject.keep.load, "_fill", fill)
    interrupted = 0
    for interrupter in moments(event, se_inject.edit.whole, step=3):

        def load() -> None:
            with pytest.raises(CheckpointError, match="bad"):
                load_se(base, tmp_path / "se.safetensors")

        interrupted += interrupter.run(load)
        assert state(base) == before
        assert same_tensors(base, twin)
    assert interrupted > 20


@pytest.mark.usefixtures("_edits_alone")
def test_load_se_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    inject_se(model, 1, divisor=1, example_input=X)
    save_se(model, tmp_path / "se.safetensors", extra="0.*")
    base = network()
    with torch.no_grad():
        base[0].weight.add_(1)
    before, twin = state(base), copy.deepcopy(base)
    plan = plan_se(base, 1, divisor=1, example_input=X)
    monkeypatch.setattr(
        se_inject.keep.load, "plan_again", lambda *_: plan
    )  # planning takes its time
    for interrupter in moments("line", se_inject.keep.load, *EDIT[:2], step=3):
        interrupter.run(lambda: load_se(base, tmp_path / "se.safetensors"))
        if state(base) != before:
            assert all(edit_of(block) for block in list(base)[1:])
            remove_se(base)
            base[0].load_state_dict(twin[0].state_dict())
        assert state(base) == before
        assert same_tensors(base, twin)


def test_removing_gives_every_kind_of_none_back() -> None:
    model = network()
    before = state(model)
    remove_se(inject_se(model, 1, divisor=1, example_input=X))
    assert state(model) == before
    assert [block.se for block in list(model)[1:]] == [None, None, None]
