"""A model on meta tensors: its forward without values, without memory and without arithmetic."""

import contextlib
import copy
import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import ForwardError, first_line
from se_inject.graph.log import tensors_in

# Functions of torch are replaced for a moment, which two threads must not do at once.
LOCK = threading.RLock()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute in the place of one that ``owner`` itself has, for a moment."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Run forwards on meta tensors: no gradients, and all that is made is made on meta.

    ``torch.autocast(x.device.type, enabled=False)`` is an error there, since meta has no autocast;
    it gets that of the CPU, which leaves meta tensors alone.
    """
    with LOCK, torch.no_grad(), torch.device("meta"), contextlib.ExitStack() as stack:
        for owner, name in _AUTOCAST:
            stack.enter_context(replaced(owner, name, _as_on_cpu(vars(owner)[name])))
        yield


# What takes the type of a device and fails for meta.
_AUTOCAST: tuple[tuple[Any, str], ...] = (
    (torch.autocast, "__init__"),
    (torch, "is_autocast_enabled"),
    (torch, "get_autocast_dtype"),
)


def _as_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def cpu(value: Any) -> Any:
        return "cpu" if isinstance(value, str) and value == "meta" else value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(cpu, args), **{k: cpu(v) for k, v in kwargs.items()})

    return call


def needs_values(error: Exception) -> bool:
    """Whether a forward stopped because meta tensors hold no data (``nonzero`` in a detector)."""
    return isinstance(error, NotImplementedError | RuntimeError) and bool(
        re.search(r"(?<![a-z])meta(?![a-z])", str(error).lower())
    )


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode whose tensors are all on meta, without the user's hooks.

    Hooks of ``torch.nn.utils`` (weight norm, spectral norm) belong to the model and stay.

    Raises:
        ForwardError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = _to_meta(tensor)
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = _library_hooks(value)
            elif isinstance(value, Tensor | list | tuple | dict):
                for tensor in tensors_in(value):  # detectors keep anchors in a plain list
                    memo.setdefault(id(tensor), _to_meta(tensor))
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a foreign __deepcopy__ may raise
        raise ForwardError(
            f"copy.deepcopy of the model fails ({type(error).__name__}: {first_line(error)});"
            " se_inject plans on a copy. Remove what cannot be copied from the modules first."
        ) from error
    twin.eval()  # not `return twin.eval()`: a train() of the user's may return None
    return twin


def _to_meta(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _library_hooks(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict(
        (key, hook)
        for key, hook in hooks.items()
        if type(hook).__module__.startswith("torch.nn.utils")
    )
