"""Puts back what a traced forward has changed: its module, and random states outside torch."""

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
from torch import nn

from se_inject.graph.recording.state import changed, state_of
from se_inject.graph.thread import OtherNetworkError


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put back what a traced forward set on its module (proxies), and refuse such a forward."""
    inner: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    attributes, contents = dict(vars(module)), [dict(d) for d in inner]
    before = state_of(module)
    try:
        yield
        module.eval()
        if sets := changed(before, state_of(module)):
            raise OtherNetworkError(
                f"its forward sets self.{sets[0]}",
                "keep it in a local variable, or return it",
            )
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        for own, content in zip(inner, contents, strict=True):
            own.clear()
            own.update(content)
        module.eval()


@contextlib.contextmanager
def foreign_random_numbers() -> Iterator[Callable[[], bool]]:
    """Puts back the random states of Python and NumPy; yields whether any number was drawn."""
    before, of_numpy = random.getstate(), _numpy_state()
    try:
        yield lambda: random.getstate() != before or _numpy_state() != of_numpy
    finally:
        random.setstate(before)
        numpy.random.set_state(pickle.loads(of_numpy))


def _numpy_state() -> bytes:
    return pickle.dumps(numpy.random.get_state())
