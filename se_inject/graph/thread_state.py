"""Remembers what planning changes in its own thread, and puts it back whatever happens.

A ``with`` block puts things back too. But a Ctrl-C that comes while a Python ``__enter__`` or
``__exit__`` runs leaves them changed. So the state is written down before planning begins. Putting
it back is safe to repeat, even if it was stopped halfway.
"""

import functools
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy
import torch

from se_inject.torch_private import (
    function_modes,
    set_function_modes,
    set_torch_function_state,
    torch_function_state,
)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Modes:
    """Whether gradients are on, and which modes see the functions of torch that run."""

    grad: bool
    functions: list[Any]
    seen: Any  # whether the modes see anything at the moment

    @classmethod
    def now(cls) -> "Modes":
        return cls(torch.is_grad_enabled(), function_modes(), torch_function_state())

    def put_back(self) -> None:
        set_torch_function_state(self.seen)
        modes = function_modes()
        if len(modes) != len(self.functions) or any(
            a is not b for a, b in zip(modes, self.functions, strict=True)
        ):
            set_function_modes(self.functions)
        if torch.is_grad_enabled() != self.grad:
            torch.set_grad_enabled(self.grad)


def modes_kept(function: Callable[P, T]) -> Callable[P, T]:
    """Put the modes of the thread back if ``function`` fails or is interrupted.

    A Ctrl-C at the first line of ``torch.no_grad.__exit__`` would leave gradients off.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        modes = Modes.now()
        try:
            return function(*args, **kwargs)
        except BaseException:
            modes.put_back()
            raise

    return call


class ForeignRandomNumbers:
    """Puts back the random states of Python and NumPy at the end of a ``with`` block."""

    def __init__(self) -> None:
        self.of_python, self.of_numpy = random.getstate(), _numpy_state()

    def drawn(self) -> bool:
        """Whether any number has been drawn since then."""
        return random.getstate() != self.of_python or _numpy_state() != self.of_numpy

    def put_back(self) -> None:
        random.setstate(self.of_python)
        numpy.random.set_state(pickle.loads(self.of_numpy))

    def __enter__(self) -> "ForeignRandomNumbers":
        return self

    def __exit__(self, *_: object) -> None:
        self.put_back()


def _numpy_state() -> bytes:
    return pickle.dumps(numpy.random.get_state())


def set_profile(profile: Any) -> None:
    """Make this the profile function of the thread, or the profiler (``cProfile``), or None.

    Up to Python 3.11, ``sys.getprofile`` returns a profiler that is written in C, but
    ``sys.setprofile`` does not accept it.
    """
    before: Any = sys.getprofile()
    if before is profile:
        return
    if hasattr(before, "disable"):
        before.disable()
    if hasattr(profile, "enable"):
        profile.enable()
    else:
        sys.setprofile(profile)


class unprofiled:  # noqa: N801 - it is called as the contexts of torch are
    """A context in which a profile function of the thread sees nothing.

    A profiler that is written in C goes on: :func:`set_profile` says why.
    """

    def __enter__(self) -> None:
        before = sys.getprofile()
        self.before = before if callable(before) else None
        if self.before is not None:
            sys.setprofile(None)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            sys.setprofile(self.before)


class ThreadState:
    """The whole state of the thread at one moment."""

    def __init__(self) -> None:
        self.modes, self.numbers = Modes.now(), ForeignRandomNumbers()
        self.profile = sys.getprofile()

    def put_back(self) -> None:
        set_profile(self.profile)
        self.modes.put_back()
        self.numbers.put_back()
