"""What is replaced in torch while a model is planned, and what the planning thread knows.

Planning runs the forwards of a copy of the model. A forward may hold on to the user's own modules
(a function that was put in place of ``forward`` and closes over one); a call that reaches such a
module goes to its copy, and a write to it stops the planning there.
"""

import os
import re
import sysconfig
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.overrides
import torch.utils.checkpoint
from torch import Tensor, nn

from se_inject.graph.patches import Replacement, in_this_thread
from se_inject.torch_private import training_property, wrapped_functions


class OtherNetworkError(Exception):
    """The graph would not do what the forward does."""


class _Thread(threading.local):
    """What the planning thread is doing; empty in every other thread."""

    tracer: Any = None  # the BlockTracer that runs
    modules: dict[int, nn.Module] = {}  # noqa: RUF012 - replaced, never changed
    tensors: dict[int, Tensor] = {}  # noqa: RUF012

    def twin_of(self, tensor: Tensor) -> Tensor:
        """The copy of one of the user's tensors; any other tensor itself."""
        return self.tensors.get(id(tensor), tensor)

    def running(self) -> Any:
        """The tracer, if what runs now is the forward that it traces."""
        return self.tracer if self.tracer is not None and not self.tracer.quiet else None


THREAD = _Thread()

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_KERNELS = tuple(
    _TORCH + part for part in ("_refs", "_prims", "_decomp", "_meta_registrations", "_inductor")
)


def is_of_torch(frame: types.FrameType, *, kernels: bool = False) -> bool:
    """Whether a frame runs code of torch (or, with ``kernels``, one of its kernels in Python)."""
    return frame.f_code.co_filename.startswith(_KERNELS if kernels else _TORCH)


def _is_the_users(filename: str) -> bool:
    """Whether a file is none of torch, of this package or of Python itself."""
    of_python = filename.startswith(_PYTHON) and not _INSTALLED.search(filename)
    return not filename.startswith((_TORCH, _HERE, "<frozen")) and not of_python


def place_of(frame: types.FrameType | None) -> str:
    """Where in the user's source a frame is: `` (net.py, line 12)``; empty if nowhere."""
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_the_users(name):
            return f" ({os.path.basename(name)}, line {frame.f_lineno})"
        frame = frame.f_back
    return ""


def in_checkpoint(frame: types.FrameType | None) -> bool:
    """Whether ``torch.utils.checkpoint`` runs what the frame belongs to."""
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def place_of_error(error: BaseException) -> str:
    """Where in the user's source an error was raised."""
    place, step = "", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if _is_the_users(name):
            place = f" ({os.path.basename(name)}, line {step.tb_lineno})"
        step = step.tb_next
    return place


def raise_interruption(error: BaseException | None) -> None:
    """Raise a Ctrl-C that foreign code has turned into another error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def replacements() -> list[Replacement]:
    """Everything that is replaced while this thread plans."""
    # Torch lists its own functions once and for all when these are asked first; the lists must not
    # have a replaced function in them.
    torch.overrides.is_tensor_method_or_property(torch.arange)
    with torch.device("meta"):
        torch.empty(0)
    here = [
        _replaced(nn.Module, "__call__", _module_call),
        _replaced(nn.Module, "__setattr__", _set_attribute),
        Replacement(nn.Module, "training", training_property(_mode_read)),
    ]
    here += [_replaced(torch, name, _with_sizes) for name in _TAKE_NUMBERS]
    here += [_replaced(space, name, _leaf_function) for name, space in wrapped_functions()]
    return here


# Functions that take a number and know none but Python's own.
_TAKE_NUMBERS = ("arange", "full", "linspace")

_Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def _replaced(owner: Any, name: str, wrapper: _Wrapper) -> Replacement:
    space = owner if isinstance(owner, dict) else vars(owner)
    original = space[name]
    return Replacement(owner, name, in_this_thread(original, wrapper(original)))


def _module_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module = THREAD.modules.get(id(module), module)
        tracer = THREAD.running()
        if tracer is None:
            return original(module, *args, **kwargs)
        return tracer.call_module(module, original, args, kwargs)

    return call


def _set_attribute(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in THREAD.modules:
            raise OtherNetworkError(
                f"sets {name!r} of your own {type(module).__name__}, which its forward holds on to"
                " (a function in the place of a forward?)"
            )
        original(module, name, value)

    return set_attribute


def _mode_read(module: nn.Module) -> Any:
    tracer = THREAD.running()
    if tracer is not None:
        tracer.mode_readers.append(module)
    try:
        return vars(module)["training"]
    except KeyError:
        raise AttributeError("training") from None


def _with_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = THREAD.running()
        if tracer is not None and tracer.holds_number((args, kwargs)):
            return tracer.apply(original, args, kwargs)
        return original(*args, **kwargs)

    return call


def _leaf_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is to be one node, as ``torch.fx.wrap`` was told."""

    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = THREAD.running()
        if tracer is None or not tracer.holds_traced((args, kwargs)):
            return original(*args, **kwargs)
        return tracer.apply(original, args, kwargs)

    return call
