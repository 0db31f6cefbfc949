"""Traces the forward of one block, every child a leaf, into a ``torch.fx`` graph."""

import contextlib
import functools
import inspect
import operator
import threading
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from se_inject.graph.meta import replaced
from se_inject.graph.record import Call
from se_inject.torch_private import pytree


class _InPlaceProxy(fx.Proxy):
    """A proxy that keeps ``x += y`` in place; fx's own would turn it into ``x = x + y``."""


def _in_place(op: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _InPlaceProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", op, (self, other), {})

    return method


for _op in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_InPlaceProxy, f"__{_op.__name__}__", _in_place(_op))


_FACTORIES: tuple[str, ...] = ("arange", "empty", "eye", "full", "linspace", "ones", "rand")


_FACTORIES += ("randint", "randn", "randperm", "tensor", "zeros")


def _refusing(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """``function``, but an error in the thread that traces."""
    tracing_thread = threading.get_ident()

    @functools.wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == tracing_thread:
            raise OtherNetworkError(f"its forward {what}")
        return function(*args, **kwargs)

    return refuse


class OtherNetworkError(Exception):
    """The graph would not do what the forward does."""


class BlockTracer(fx.Tracer):
    """Traces one module's own forward for one recorded call; every child is a leaf."""

    proxy_buffer_attributes = True

    def __init__(self, name: str, call: Call) -> None:
        # A checkpointed part becomes an argument that fx refuses; inlined, it would be no longer.
        super().__init__(autowrap_functions=(torch.utils.checkpoint.checkpoint,))
        self.name = name
        self.call = call
        self.children = {child: iter(calls) for child, calls in call.children.items()}
        self.grad_mode = torch.is_grad_enabled()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace; tensors that the forward makes are made anew in every call of the graph.

        fx itself cannot see ``torch.rand(x.shape[0], 1, 1, 1)`` and would freeze ``torch.ones(1)``;
        and it would drop without a word what a graph cannot say: autocast regions, and the
        backward of an ``autograd.Function``.
        """
        with contextlib.ExitStack() as stack:
            for name in _FACTORIES:
                stack.enter_context(replaced(torch, name, self._recorded(getattr(torch, name))))
            for name in ("__init__", "__enter__"):  # one that decorates a function is made before
                enter = _refusing(vars(torch.autocast)[name], "enters autocast")
                stack.enter_context(replaced(torch.autocast, name, enter))
            checkpoint = _refusing(torch.utils.checkpoint.checkpoint, "is checkpointed")
            stack.enter_context(replaced(torch.utils.checkpoint, "checkpoint", checkpoint))
            apply = vars(torch.autograd.Function)["apply"]
            call = _refusing(
                lambda cls, *args, **kwargs: apply.__get__(None, cls)(*args, **kwargs),
                "calls an autograd.Function",
            )
            stack.enter_context(replaced(torch.autograd.Function, "apply", classmethod(call)))
            graph = super().trace(root, concrete_args)
        if any("_tensor_constant" in str(n.target) for n in graph.nodes if n.op == "get_attr"):
            raise OtherNetworkError("its forward makes a tensor that fx would freeze")
        return graph

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        tracing_thread = threading.get_ident()

        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != tracing_thread:  # a data loader's, say
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return record

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_grad_enabled() != self.grad_mode:
            raise OtherNetworkError("its forward switches gradients on or off")
        return super().create_node(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A child's output: a proxy, or a container of proxies where the child returned one."""
        proxy = super().call_module(m, forward, args, kwargs)
        name = f"{self.name}.{self.path_of_module(m)}".lstrip(".")
        call = next(self.children.get(name, iter(())), None)
        if call is None:
            return proxy

        def leaf(proxy: Any, value: Any) -> Any:
            # Names beside the tensors (of a pyramid's levels) are what the code iterates over.
            return value if value is None or isinstance(value, str | list) else proxy

        return _unpacked(proxy, call.output, leaf)

    def create_arg(self, a: Any) -> Any:
        # The code of a graph is what its arguments print: np.float64(0.5) is no name there.
        return super().create_arg(a.item() if isinstance(a, numpy.generic) else a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder a parameter, named and defaulted as in the source.

        Unlike fx's own, this keeps the signature when an argument is a list of tensors (the
        placeholder is indexed), so the new forward is called as the old one was.
        """
        positional: list[Any] = [self.root]
        keyword: dict[str, Any] = {}
        parameters = inspect.signature(root_fn).parameters
        for name, value in bind(root_fn, self.root, self.call).items():
            parameter = parameters[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                proxy: Any = self.create_proxy("placeholder", f"*{name}", (), {})
                self._expect_length(proxy, value, name)
                positional += [self._argument(proxy[i], v, name) for i, v in enumerate(value)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                proxy = self.create_proxy("placeholder", f"**{name}", (), {})
                self._expect_length(proxy, value, name)
                keyword |= {k: self._argument(proxy[k], v, name) for k, v in value.items()}
            else:
                default = () if parameter.default is parameter.empty else (parameter.default,)
                proxy = self.create_proxy("placeholder", name, default, {})
                stand_in = self._argument(proxy, value, name)
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keyword[name] = stand_in
                else:
                    positional.append(stand_in)
        return lambda: root_fn(*positional, **keyword), []

    def _argument(self, proxy: Any, value: Any, name: str) -> Any:
        """What the forward sees in place of an argument: a proxy, or the value if Python asks it.

        Flags and absent arguments decide which way the code goes, so they are made concrete, and
        the graph checks them; numbers and sizes stay symbolic, so that other sizes work too.
        """

        def leaf(proxy: Any, value: Any) -> Any:
            if value is None or isinstance(value, bool | str):
                self.create_proxy("call_function", expect, (proxy, value, name), {})
                return value
            if isinstance(value, Tensor) or _is_symbolic(value):
                return proxy
            raise OtherNetworkError(
                f"its argument {name!r} is a {type(value).__name__}, which may decide its way"
            )

        if isinstance(value, list | tuple | dict) and _holds_tensor(value):
            self._expect_length(proxy, value, name)
        return _unpacked(proxy, value, leaf)

    def _expect_length(self, proxy: Any, value: Any, name: str) -> None:
        length = self.create_proxy("call_function", len, (proxy,), {})
        self.create_proxy("call_function", expect, (length, len(value), f"len({name})"), {})


def _unpacked(proxy: Any, value: Any, leaf: Callable[[Any, Any], Any]) -> Any:
    """A container of tensors with each item of it read from the proxy; else ``leaf``."""
    if isinstance(value, list | tuple) and _holds_tensor(value):
        items = [_unpacked(proxy[i], v, leaf) for i, v in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict) and _holds_tensor(value):
        return type(value)((k, _unpacked(proxy[k], v, leaf)) for k, v in value.items())
    return leaf(proxy, value)


def expect(value: Any, recorded: Any, argument: str) -> None:
    """Stop a call that would need another path through the forward than the recorded one."""
    if value is not recorded and value != recorded:
        raise RuntimeError(
            f"argument {argument!r} was {recorded!r} when the SE block was inserted; this block"
            f" now serves no other value. remove_se(model) brings back its own forward."
        )


def bind(forward: Callable[..., Any], module: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a recorded call by parameter name, defaults filled in."""
    bound = inspect.signature(forward).bind(module, *call.args, **call.kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _is_symbolic(value: Any) -> bool:
    """A number, or a size made of numbers: it may differ from call to call."""
    if isinstance(value, tuple | list):
        return all(map(_is_symbolic, value))
    return isinstance(value, int | float) and not isinstance(value, bool)
