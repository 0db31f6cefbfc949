"""A Ctrl-C at any line, of ours or of torch below us: the process and the model stay whole.

``test_whole.py`` stops at every line of a few files; here are lines drawn from all that run, with
those of torch, contextlib and copy that are called on the way. ``-m long`` draws 2,000 of them.
"""

import random
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from small_net import build
from test_untouched import state_of, torch_state
from test_whole import state
from torch import nn

import se_inject
from se_inject import inject_se, load_se, plan_se, remove_se, save_se
from se_inject.edit.block_class import edit_of
from se_inject.graph.thread import THREAD
from se_inject.graph.tracing import patches
from se_inject.graph.tracing.patches import LOCK, Replacement, run_replaced

X = torch.randn(2, 3, 8, 8)
OURS = str(Path(se_inject.__file__).parent)
BELOW = (str(Path(torch.__file__).parent), "contextlib.py", "copy.py")
# It runs when Python collects garbage, where Python itself ignores whatever is raised.
CLEANING = f"{BELOW[0]}/_dynamo"


class Stopper:
    """Raises KeyboardInterrupt at the n-th line that runs in our files or below them."""

    def __init__(self, n: int | None, only: str = "") -> None:
        self.n, self.count, self.at, self.only = n, 0, "", only

    def __call__(self, frame: types.FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not (name.startswith((OURS, BELOW[0])) or name.endswith(BELOW[1:])):
            return None
        if name.startswith(CLEANING):
            return None
        if event == "line" and name.endswith(self.only):
            self.count += 1
            if self.count == self.n:
                self.at = f"{name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def run(self, operation: Callable[[], Any]) -> bool:
        """Whether it was stopped; an error of another kind goes through."""
        sys.settrace(self)
        try:
            operation()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        assert not self.at, f"the Ctrl-C at {self.at} was lost"
        return False


def process_state() -> list[Any]:
    """What an interruption must leave as it was, beside the model."""
    numbers = random.getstate(), repr(numpy.random.get_state())
    default = torch.tensor(0.0).device, torch.get_default_dtype()
    return [*torch_state(), *numbers, *default, dict(vars(THREAD)), another_thread_can_plan()]


def another_thread_can_plan() -> bool:
    """Whether the lock on the replaced functions of torch is free, as another thread sees it."""

    def take() -> bool:
        return LOCK.acquire(blocking=False) and not LOCK.release()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(take).result()


def check_interruptions(operation: str, count: int, seed: int, folder: Path) -> None:
    path = folder / "se.safetensors"
    save_se(inject_se(build(), 4, example_input=X), path)
    model = build().train()
    do: Callable[[], Any] = {
        "plan": lambda: plan_se(model, 4, example_input=X),
        "apply": lambda: inject_se(model, 4, example_input=X),
        "load": lambda: load_se(model, path),
        "remove": lambda: remove_se(model),
    }[operation]
    everything, base = list(state_of(model)), state(model)

    def prepare() -> list[Any]:
        if operation == "remove" and not any(map(edit_of, model.modules())):
            inject_se(model, 4, example_input=X)
        return state(model)

    prepare()
    counter = Stopper(None)
    counter.run(do)
    if operation in ("apply", "load"):
        remove_se(model)
    draw = random.Random(seed)
    stopped = 0
    for _ in range(count):
        before, around = prepare(), process_state()
        stopper = Stopper(draw.randint(1, counter.count))
        stopped += stopper.run(do)
        assert process_state() == around, stopper.at
        if operation == "plan":
            assert list(state_of(model)) == everything, stopper.at
        elif state(model) != before:  # it came when all was done
            edits = [bool(edit_of(block)) for block in model.blocks]  # type: ignore[union-attr]
            assert edits == [operation != "remove"] * len(edits), stopper.at
            if operation != "remove":
                remove_se(model)
            assert state(model) == base, stopper.at
    assert stopped > count * 0.8
    if operation == "remove" and any(map(edit_of, model.modules())):
        remove_se(model)
    assert state(model) == base
    assert len(plan_se(model, 4, example_input=X).sites) == len(model.blocks)  # type: ignore[arg-type]
    assert nn.Linear(2, 2)(torch.zeros(1, 2)).device.type == "cpu"


OPERATIONS = ["plan", "apply", "load", "remove"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_8_interruptions(operation: str, tmp_path: Path) -> None:
    check_interruptions(operation, 8, 0, tmp_path)


def test_each_line_under_the_lock() -> None:
    here = types.SimpleNamespace(value=0)

    def do() -> None:
        run_replaced(lambda: [Replacement(here, "value", 1)], lambda: None, lambda: None)

    counter = Stopper(None, patches.__file__)
    counter.run(do)
    assert counter.count > 15
    for n in range(1, counter.count + 1):
        stopper = Stopper(n, patches.__file__)
        assert stopper.run(do)
        assert here.value == 0, stopper.at
        assert another_thread_can_plan(), stopper.at


@pytest.mark.parametrize("load", [False, True])
def test_each_line_of_the_context_managers_of_gradients(load: bool, tmp_path: Path) -> None:
    path = tmp_path / "se.safetensors"
    save_se(inject_se(build(), 4, example_input=X), path)
    model = build()
    plan = plan_se(model, 4, example_input=X)

    def do() -> None:
        load_se(model, path) if load else plan.apply()

    counter = Stopper(None, "grad_mode.py")
    counter.run(do)
    assert counter.count > 5
    remove_se(model)
    # The last ones are of the edit and of the tensors that are filled in.
    some = {
        *range(1, counter.count + 1, max(1, counter.count // 6)),
        *range(counter.count - 8, counter.count + 1),
    }
    for n in sorted(some - {0}):
        around, stopper = process_state(), Stopper(n, "grad_mode.py")
        assert stopper.run(do)
        assert process_state() == around, stopper.at
        assert not any(map(edit_of, model.modules())), stopper.at


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_2000_interruptions(operation: str, part: int, tmp_path: Path) -> None:
    check_interruptions(operation, 100, 1 + part, tmp_path)
