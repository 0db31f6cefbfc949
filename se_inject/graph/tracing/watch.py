"""Sees calls of a traced forward that no function mode of torch sees and no graph can express."""

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

from se_inject.graph.frames import is_of_planning, is_of_torch
from se_inject.graph.thread import THREAD
from se_inject.graph.thread_state import set_profile
from se_inject.graph.tracing.legacy import LEGACY_TYPES
from se_inject.graph.tracing.nodes import CHECKPOINT

T = TypeVar("T")

_AUTOCAST = "enters autocast", "run the whole model under autocast, or exclude= the block"
_CHECKPOINT = "is checkpointed", CHECKPOINT
# What the forward does, and what the user can do instead.
_FUNCTIONS = {
    torch.autocast.__init__.__code__: _AUTOCAST,
    torch.autocast.__enter__.__code__: _AUTOCAST,
    torch.inference_mode.__enter__.__code__: ("enters inference mode", "write x.detach()"),
    torch.autograd.graph.saved_tensors_hooks.__enter__.__code__: _CHECKPOINT,
}
_MODES = {
    torch.is_autocast_enabled: "autocast",
    torch.is_autocast_cpu_enabled: "autocast",
    torch.get_autocast_dtype: "autocast",
    torch.get_autocast_gpu_dtype: "autocast",
    torch.get_autocast_cpu_dtype: "autocast",
    torch.is_grad_enabled: "gradient mode",
    torch.is_inference_mode_enabled: "inference mode",
}


def watched(body: Callable[[], T]) -> T:
    """Run ``body``, and refuse it if it calls something that no graph can express.

    A profile function watches the calls. It belongs to one thread, so nothing is replaced in torch.
    """
    before = sys.getprofile()
    try:
        set_profile(_see)
        return body()
    finally:
        set_profile(before)


def _see(frame: types.FrameType, event: str, argument: Any) -> None:
    # This sees every call, so the test that excludes most of them comes first, the tracer last.
    if event == "call":
        what = _FUNCTIONS.get(frame.f_code)
        if what is None and frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            what = _CHECKPOINT
    elif event == "c_call":
        what = _of_builtin(frame, argument)
    else:
        return
    if what is not None and (tracer := THREAD.running()) is not None:
        raise tracer.refused(*what)


def _of_builtin(frame: types.FrameType, function: Any) -> tuple[str, str] | None:
    """What a frame does by calling a function written in C, and what the user can do instead."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        if function.__name__ == "apply":
            return "calls an autograd.Function", "compute the same with functions of torch"
        return None
    if function is not isinstance and (mode := _mode_of(function)) is None:
        return None
    if is_of_torch(frame) or is_of_planning(frame):
        return None  # these ask for their own purposes
    if function is isinstance:
        # Such a type contains a device and a dtype, and a copy on meta has none of these types.
        if LEGACY_TYPES.isdisjoint(frame.f_code.co_names):
            return None
        return (
            "asks whether a tensor is a torch.FloatTensor or the like",
            "ask x.is_floating_point()",
        )
    return f"asks whether {mode} is on, and may take another way then", "take one way for both"


def _mode_of(function: Any) -> str | None:
    try:
        return _MODES.get(function)
    except TypeError:  # it is a bound method of an object that cannot be hashed
        return None
