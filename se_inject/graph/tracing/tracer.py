"""Traces the forward of one block into a ``torch.fx`` graph, with every child as a leaf.

The forward runs on meta tensors of the recorded shapes. A mode sees every function of torch that it
calls and writes it into the graph. The tensors are real objects, so Python gets the usual answers
about them. Sizes and numbers are values of :mod:`.values`. Modes belong to one thread, so no other
thread notices.
"""

import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from se_inject.graph.containers import all_leaves
from se_inject.graph.frames import is_of_torch, is_unpacked_next, user_frame
from se_inject.graph.held import Held
from se_inject.graph.operations.log import GUESSES
from se_inject.graph.recording.call import Call
from se_inject.graph.recording.replay import output_of
from se_inject.graph.thread import THREAD, OtherNetworkError
from se_inject.graph.thread_state import unprofiled
from se_inject.graph.tracing.arguments import placeholders
from se_inject.graph.tracing.functions import (
    ASIDE,
    PARTS,
    PLACES,
    PROPERTIES,
    VALUES,
    as_in_source,
)
from se_inject.graph.tracing.legacy import replacements
from se_inject.graph.tracing.machine import Machine
from se_inject.graph.tracing.nodes import GraphBuilder
from se_inject.graph.tracing.patches import run_replaced
from se_inject.graph.tracing.shape import plain
from se_inject.graph.tracing.watch import watched


class BlockTracer(GraphBuilder, TorchFunctionMode):
    """Traces one module's own forward for one recorded call, with every child as a leaf."""

    def __init__(self, name: str, call: Call) -> None:
        super().__init__()
        self.name = name
        self.call = call
        self.children = {child: iter(calls) for child, calls in call.children.items()}
        self.mode_readers: list[nn.Module] = []

    def trace(self, root: nn.Module) -> fx.Graph:
        """The graph of the root's forward in its present mode (eval or train)."""
        self._root, self._held = root, Held(root)
        self._forward = type(root).forward
        for path, module in root.named_modules():
            self._modules.setdefault(id(module), path)
            for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
                if isinstance(value, Tensor):
                    self._paths.setdefault(id(value), f"{path}.{name}".lstrip("."))
        positional, keyword = placeholders(self, root, self.call)

        def run() -> Any:
            try:
                # Gradients are on, so that a forward that switches them off is noticed.
                with torch.enable_grad(), self:
                    THREAD.tracer = self
                    return watched(lambda: self._forward(root, *positional, **keyword))
            finally:
                THREAD.tracer = None

        def end() -> None:
            THREAD.tracer = None

        output = run_replaced(lambda: replacements(self._forward), run, end)
        self._check_held("")
        self.graph.create_node("output", "output", (self.argument(output),), {})
        return self.graph

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        if self.quiet or is_of_torch(frame, kernels=True):
            return func(*args, **kwargs)
        with unprofiled():
            return self._seen(frame, func, args, kwargs)

    def _seen(
        self,
        frame: types.FrameType,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What the forward gets from a function that it calls in a frame."""
        name = getattr(func, "__name__", str(func))
        # Torch's list of methods lacks some that it writes in Python (Tensor.unflatten).
        method = (
            torch.overrides.is_tensor_method_or_property(func) or vars(Tensor).get(name) is func
        )
        self._drop_pending(args, kwargs)
        if func is torch._C._set_grad_enabled:
            raise self.refused("switches gradients on or off", "write x.detach() in its place")
        if name in ASIDE:
            return func(*plain(args), **plain(dict(kwargs)))
        if func in GUESSES or (name in VALUES and (method or name in ("equal", "allclose"))):
            raise self.refused(
                "asks a tensor for its values", "torch.where(...) can take the place of an `if`"
            )
        if name == "__set__":
            attribute = func.__self__.__name__  # type: ignore[attr-defined]
            raise self.refused(f"sets .{attribute} of a tensor", "make a new tensor in its place")
        if name == "__get__":
            return self._attribute(args[0], func.__self__.__name__)  # type: ignore[attr-defined]
        if name in PLACES and method and not (name == "type" and (len(args) > 1 or kwargs)):
            value = func(*plain(args), **plain(dict(kwargs)))
            return self._machine("call_method", name, args, kwargs, value, PLACES[name])
        value = self._operation(func, name, method, args, kwargs)
        if name == "__len__":
            return value.__index__()
        if name in PARTS and not is_unpacked_next(user_frame(frame)):
            self.expect(self.node_of("call_function", len, (self._last,)), len(value))
        return value

    def _operation(
        self, func: Callable[..., Any], name: str, method: bool, args: Any, kwargs: Any
    ) -> Any:
        node = self.node_of(*as_in_source(func, name, method, args, kwargs), kwargs)
        self._last = node
        inputs = {id(t): t for t in all_leaves((args, kwargs)) if isinstance(t, Tensor)}
        with self.quietly():
            value = func(*plain(tuple(args)), **plain(dict(kwargs)))
        return self.wrapped(node, value, inputs)

    def _attribute(self, tensor: Tensor, name: str) -> Any:
        with self.quietly():
            value = getattr(tensor, name)
        source = self.node_of_tensor(tensor)
        if isinstance(value, Tensor):
            node = self.node_of("call_function", getattr, (source, name))
            return self.register(node, self.alias(value) if value is tensor else value)

        def later() -> fx.Node:
            return self.node_of("call_function", getattr, (source, name))

        if name in ("shape", "ndim"):
            return self.wrapped(later, value)
        if value is None and name not in PROPERTIES:
            return None
        return Machine(self, later, value, PROPERTIES.get(name, f"property .{name}"))

    def _machine(self, op: str, target: Any, args: Any, kwargs: Any, value: Any, what: str) -> Any:
        node = self.node_of(op, target, args, kwargs)
        return Machine(self, node, value, what)

    def _check_held(self, path: str) -> None:
        """Refuse a forward that changes what a module holds, because a graph would not do that."""
        if name := self._held.changed(path):
            raise OtherNetworkError(
                f"its forward changes what self.{name} holds",
                "keep it in a local variable, or return it",
            )

    def call_module(
        self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """The recorded output of a child. A layer that the forward itself makes is part of it."""
        path = self._modules.get(id(module))
        if path is None:
            return original(module, *args, **kwargs)
        if not path:
            raise self.refused("calls itself")
        if path.endswith("activation_post_process") and type(module) is nn.Identity:
            # This child belongs to a FloatFunctional. FX quantization replaces that by one without
            # such a child.
            return args[0]
        with unprofiled():
            return self._call_child(path, module, original, args, kwargs)

    def _call_child(
        self, path: str, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        node = self.node_of("call_module", path, args, kwargs)
        name = f"{self.name}.{path}".lstrip(".")
        call = next(self.children.get(name, iter(())), None)
        inputs = {id(t): t for t in all_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if call is None:
            with self.quietly():
                self._check_held(path)
                value = original(module, *plain(tuple(args)), **plain(dict(kwargs)))
                self._held.renew(path)  # its hooks may set its attributes (weight norm)
        else:
            value = output_of(call, list(inputs.values()), self.alias)
        return self.wrapped(node, value, inputs)
