"""What is replaced in torch while a model is planned.

Planning runs the forwards of a copy of the model. A forward may hold on to the user's own modules
(if a function was put in place of ``forward`` and closes over one). A call that reaches such a
module goes to its copy, and a write to such a module ends the planning of that block.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.overrides
from torch import nn
from torch.autograd.variable import Variable, VariableMeta

from se_inject.graph.scripted import named
from se_inject.graph.thread import THREAD, OtherNetworkError
from se_inject.graph.tracing import old_parser
from se_inject.graph.tracing.patches import Replacement, in_this_thread
from se_inject.torch_private import training_property, wrapped_functions


def replacements() -> list[Replacement]:
    """Everything that is replaced while this thread plans."""
    # Torch makes lists of its own functions when these are first called. The lists must not contain
    # a replaced function.
    torch.overrides.is_tensor_method_or_property(torch.arange)
    with torch.device("meta"):
        torch.empty(0)
    here = [
        _replaced(nn.Module, "__call__", _module_call),
        _replaced(nn.Module, "__setattr__", _set_attribute),
        Replacement(nn.Module, "training", training_property(_mode_read)),
    ]
    here += [
        _replaced(torch.jit.ScriptFunction, "__call__", _scripted_call),
        Replacement(VariableMeta, "__call__", in_this_thread(type.__call__, _variable)),
    ]
    here += [_replaced(torch, name, _with_sizes) for name in _TAKE_NUMBERS]
    here += [_replaced(math, name, _with_sizes) for name in _OF_NUMBERS]
    here += [_replaced(space, name, _leaf_function) for name, space in wrapped_functions()]
    return here + old_parser.replacements()


# These functions take only Python's own numbers.
_TAKE_NUMBERS = ("arange", "full", "linspace")
# These are functions of numbers, such as sqrt(h * w) for a scale, and belong in the graph too.
_OF_NUMBERS = ("sqrt", "exp", "log", "log2", "log10", "pow")

_Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def _replaced(owner: Any, name: str, wrapper: _Wrapper) -> Replacement:
    space = owner if isinstance(owner, dict) else vars(owner)
    original = space[name]
    return Replacement(owner, name, in_this_thread(original, wrapper(original)))


def _module_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module = THREAD.modules.get(id(module), module)
        in_charge = THREAD.running() or THREAD.replay
        if in_charge is None:
            return original(module, *args, **kwargs)
        return in_charge.call_module(module, original, args, kwargs)

    return call


def _scripted_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """A TorchScript function becomes one node, because no mode sees what runs in it."""

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = THREAD.running()
        if tracer is None or not tracer.holds_traced((args, kwargs)):
            return original(function, *args, **kwargs)
        target = named(function, sys._getframe(2).f_globals)
        if target is None:
            raise tracer.refused(
                "calls a TorchScript function that no module has a name for",
                "keep the function in a module, under a name of its own",
            )
        return tracer.apply(target, args, kwargs)

    return call


def _variable(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """``Variable(x)`` of old code, which is another name for x without its gradients."""
    if kind is not Variable or len(args) != 1 or any(kwargs.values()):
        if THREAD.running():
            raise THREAD.running().refused(
                "makes a Variable with gradients", "use the tensor itself"
            )
        return type.__call__(kind, *args, **kwargs)
    return args[0].detach()


def _set_attribute(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in THREAD.modules:
            raise OtherNetworkError(
                f"sets {name!r} of your own {type(module).__name__}, which its forward holds on to"
                " (a function in the place of a forward?)",
                "give the module a class with that forward",
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
        given = (args, kwargs)
        if tracer is not None and (
            tracer.holds_number(given) or old_parser.refused_by_torch(given)
        ):
            return tracer.apply(original, args, kwargs)
        return original(*args, **kwargs)

    return call


def _leaf_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that becomes one node, because it was registered with ``torch.fx.wrap``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = THREAD.running()
        if tracer is None or not tracer.holds_traced((args, kwargs)):
            return original(*args, **kwargs)
        return tracer.apply(original, args, kwargs)

    return call
