"""Sees what a traced forward calls that no function mode of torch sees, and no graph can say."""

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

from se_inject.graph.planning import THREAD, is_of_torch
from se_inject.graph.thread_state import set_profile

T = TypeVar("T")

_FUNCTIONS = {
    torch.autocast.__init__.__code__: "enters autocast",
    torch.autocast.__enter__.__code__: "enters autocast",
    torch.inference_mode.__enter__.__code__: "enters inference mode",
    torch.autograd.graph.saved_tensors_hooks.__enter__.__code__: "is checkpointed",
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
_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_LEGACY_TYPES = {f"{kind}Tensor" for kind in _KINDS}


def watched(body: Callable[[], T]) -> T:
    """Run ``body``; what it calls on the way may raise the tracer's refusal.

    A profile function belongs to one thread, so nothing is replaced in torch for this.
    """
    before = sys.getprofile()
    try:
        set_profile(_see)
        return body()
    finally:
        set_profile(before)


def _see(frame: types.FrameType, event: str, argument: Any) -> None:
    tracer = THREAD.running()
    if tracer is None:
        return
    if event == "call":
        what = _FUNCTIONS.get(frame.f_code)
        if what is None and frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            what = "is checkpointed"
        if what is not None:
            raise tracer.refused(what)
    elif event == "c_call":
        owner = getattr(argument, "__self__", None)
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            if argument.__name__ == "apply":
                raise tracer.refused("calls an autograd.Function")
        elif is_of_torch(frame):
            return  # torch asks for its own purposes
        elif argument is isinstance:
            # Such a type has a device and a dtype in it, and a copy on meta is of none of them.
            if not _LEGACY_TYPES.isdisjoint(frame.f_code.co_names):
                raise tracer.refused("asks whether a tensor is a torch.FloatTensor or the like")
        elif (mode := _mode_of(argument)) is not None:
            raise tracer.refused(f"asks whether {mode} is on, and may take another way then")


def _mode_of(function: Any) -> str | None:
    try:
        return _MODES.get(function)
    except TypeError:  # a bound method of what cannot be hashed
        return None
