"""Lets old versions of torch take the devices and dtypes of a trace as arguments.

``x.device`` gives a stand-in in a trace. Newer versions of torch accept a stand-in wherever they
take a device or a dtype, and tell the tracer's mode. Older versions (2.6) refuse it before any mode
sees the call. With these, the functions that take one are replaced and tell the tracer themselves.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from se_inject.graph.containers import all_leaves
from se_inject.graph.thread import THREAD
from se_inject.graph.tracing.machine import Machine
from se_inject.graph.tracing.patches import Replacement, in_this_thread

_MAKERS: tuple[str, ...] = (
    "as_tensor",
    "empty",
    "eye",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
)
_MAKERS += ("tensor", "zeros", "empty_like", "full_like", "ones_like", "rand_like", "randint_like")
_MAKERS += ("randn_like", "zeros_like")
_SUMS = ("cumprod", "cumsum", "log_softmax", "mean", "nansum", "prod", "softmax", "sum")
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to", "view")


class _StandIn:
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None


@functools.cache
def _is_old() -> bool:
    stand_in: Any = _StandIn()
    try:
        torch.empty(1, device=stand_in)
    except TypeError:
        return True
    return False


def refused_by_torch(args: Any) -> bool:
    """Whether the arguments include a device or dtype of the trace that torch would refuse."""
    return _is_old() and any(type(v) is Machine for v in all_leaves(args))


def replacements() -> list[Replacement]:
    """Replacements for what takes a device or a dtype. With a newer torch there are none."""
    if not _is_old():
        return []
    owners: list[tuple[Any, str]] = [(torch, name) for name in (*_MAKERS, *_SUMS)]
    owners += [(Tensor, name) for name in (*_METHODS, *_SUMS)]
    return [Replacement(owner, name, _told(getattr(owner, name))) for owner, name in owners]


def _told(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = THREAD.running()
        if tracer is not None and refused_by_torch((args, kwargs)):
            return tracer.__torch_function__(original, (), args, kwargs)
        return original(*args, **kwargs)

    return in_this_thread(original, call)
