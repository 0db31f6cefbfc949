"""Builds the graph of a trace: its nodes, their arguments, and the values that stand for them."""

import contextlib
import dataclasses
import enum
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from se_inject.graph.containers import all_leaves
from se_inject.graph.expect import expect_answer, question_of
from se_inject.graph.frames import in_checkpoint, place_of
from se_inject.graph.thread import THREAD, OtherNetworkError
from se_inject.graph.thread_state import unprofiled
from se_inject.graph.tracing.functions import PROPERTIES
from se_inject.graph.tracing.machine import Machine
from se_inject.graph.tracing.number import Int, Scalar
from se_inject.graph.tracing.shape import Shape, plain
from se_inject.graph.tracing.values import Traced
from se_inject.torch_private import without_torch_functions

CHECKPOINT = "inject without checkpointing, and checkpoint the whole block from outside"

Made = fx.Node | Callable[[], fx.Node]  # a node, or a way to make it when somebody uses the value


class GraphBuilder:
    """The graph of one block while it is traced, and the tensors and values behind its nodes."""

    _root: nn.Module
    _forward: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quiet = 0  # if it is more than 0, the code that runs is not the forward's own
        self.graph = fx.Graph()
        self._nodes: dict[int, tuple[Tensor, Made]] = {}
        self._paths: dict[int, str] = {}
        self._modules: dict[int, str] = {}
        self._got: dict[str, fx.Node] = {}
        self._asked: dict[fx.Node, fx.Node] = {}
        self._pending: list[tuple[Int, fx.Node]] = []

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Run code that is not the forward's own. It makes no nodes, and nothing is watched."""
        self.quiet += 1
        try:
            with unprofiled():
                gradients = torch.is_grad_enabled()
                _switch_gradients(False)
                try:
                    yield
                finally:
                    _switch_gradients(gradients)
        finally:
            self.quiet -= 1

    def node_of(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> fx.Node:
        """Add a new node to the graph."""
        with unprofiled():  # it would see each of the hundreds of calls in here
            arguments = self.argument(args), self.argument(dict(kwargs or {}))
            self._pending.clear()
            return self.graph.create_node(op, target, *arguments)

    def item(self, node: fx.Node, key: Any) -> Callable[[], fx.Node]:
        return lambda: self.node_of("call_function", operator.getitem, (node, key))

    def apply(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> Any:
        """Call a function in the graph, and also here with the recorded values."""
        kwargs = kwargs or {}
        node = self.node_of("call_function", function, args, kwargs)
        inputs = {id(t): t for t in all_leaves((args, kwargs)) if isinstance(t, Tensor)}
        with self.quietly():
            value = function(*plain(tuple(args)), **plain(dict(kwargs)))
            if isinstance(value, Tensor) and id(value) not in inputs:
                value = value.to("meta")  # a type of tensors made it, which no mode sees
        return self.wrapped(node, value, inputs)

    def wrapped(
        self,
        node: Made,
        value: Any,
        inputs: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """What the forward sees in place of a node's value."""
        if isinstance(value, Tensor):
            # An in-place operation returns its input, which has its own node already.
            return self.register(node, self.alias(value) if id(value) in (inputs or {}) else value)
        if isinstance(value, torch.Size):
            return Shape.of(self, node, value)
        if isinstance(value, bool | float):
            return Scalar(self, node, value)
        if isinstance(value, int):
            return Int(self, node, value)
        if isinstance(value, torch.device | torch.dtype | torch.layout):
            return Machine(self, node, value, PROPERTIES.get(type(value).__name__, "dtype"))
        if isinstance(value, list | tuple) or type(value) in (dict, OrderedDict):
            made = node_made(node)
            return rebuilt_with(value, lambda key, v: self.wrapped(self.item(made, key), v, inputs))
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            made = node_made(node)
            items = value.items() if isinstance(value, Mapping) else vars(value).items()
            get = operator.getitem if isinstance(value, Mapping) else getattr
            for key, item in items:
                if isinstance(item, Tensor):
                    self.register(_call_later(self, get, made, key), item)
        return value

    def register(self, node: Made, tensor: Tensor) -> Tensor:
        self._nodes[id(tensor)] = (tensor, node)
        return tensor

    def alias(self, tensor: Tensor) -> Tensor:
        """Another object for the same tensor, so that the two can have different nodes."""
        with self.quietly():
            return tensor.detach()

    def node_of_tensor(self, tensor: Tensor) -> fx.Node:
        """The node that a tensor comes from, which may read an attribute of the block."""
        known = self._nodes.get(id(tensor))
        if known is not None:
            node = known[1]
            if not isinstance(node, fx.Node):
                node = node()
                self._nodes[id(tensor)] = (tensor, node)
            return node
        twin = THREAD.twin_of(tensor)
        path = self._paths.get(id(twin))
        if path is None:
            raise self.refused(
                "uses a tensor that was not made by a function of torch that a graph can call again"
                " (from NumPy, by torch.Tensor(...), or kept in a list)",
                "write torch.zeros(...) or torch.tensor(...), or register it as a buffer",
            )
        if path not in self._got:
            self._got[path] = self.graph.create_node("get_attr", path, (), {})
        return self._got[path]

    def argument(self, a: Any) -> Any:
        """A value in the form in which it can be an argument of a node."""
        kind = type(a)
        if isinstance(a, fx.Node):
            return a
        if issubclass(kind, Traced | Shape):
            return a.traced_node()
        if isinstance(a, Tensor):
            return self.node_of_tensor(a)
        if isinstance(a, numpy.generic):  # the code of a graph contains the repr of its arguments
            return a.item()
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self.node_of("call_function", kind, tuple(a))
        if isinstance(a, tuple | list):
            return (tuple if isinstance(a, tuple) else list)(self.argument(v) for v in a)
        if isinstance(a, dict) and not dataclasses.is_dataclass(a):
            return {k: self.argument(v) for k, v in a.items()}
        if isinstance(a, slice):
            return slice(*(self.argument(v) for v in (a.start, a.stop, a.step)))
        if isinstance(a, range):
            return range(*(operator.index(v) for v in (a.start, a.stop, a.step)))
        if isinstance(a, torch.device | torch.dtype):
            return self._own(a)
        if a is None or a is ... or isinstance(a, _CONSTANTS):
            return a
        if isinstance(a, nn.Module) and id(a) in self._modules:
            return self.graph.create_node("get_attr", self._modules[id(a)], (), {})
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
            return self.node_of("call_function", kind, (), fields)
        raise self.refused(
            f"hands on a {kind.__name__}, which a graph cannot hold",
            "hand on tensors, numbers and strings",
        )

    def _own(self, value: torch.device | torch.dtype) -> Any:
        """A device or dtype. If it is an attribute of the block, every call reads it again."""
        names = self._forward.__code__.co_names
        for name, own in vars(self._root).items():
            if type(own) is type(value) and own == value and name in names:
                return self.graph.create_node("get_attr", name, (), {})
        if value == torch.device("meta"):
            raise self.refused(
                "has a device in it that only the copy on meta has", "write x.device in its place"
            )
        return value

    # --- questions -----------------------------------------------------------------------------
    def expect(self, node: fx.Node, value: Any) -> fx.Node:
        """Let the graph check that a question has the recorded answer."""
        if node not in self._asked:
            question = question_of(node)
            self._asked[node] = self.node_of(
                "call_function", expect_answer, (node, value, question)
            )
        return self._asked[node]

    def index(self, number: Int) -> int:
        """The number itself, for C code that needs it.

        If a function of torch needs it, the graph gives that function the node instead.
        """
        value: int = number.recorded_value()
        if self.quiet:
            return value
        node = number.traced_node()
        if node not in self._asked:
            pending = list(self._pending)
            check = self.expect(node, value)
            self._pending = [*pending, (number, check)]
        return value

    def _drop_pending(self, args: Any, kwargs: Any) -> None:
        """Drop the checks of numbers for which the function that asked now has the nodes."""
        given = {id(v) for v in all_leaves((args, kwargs))}
        for number, check in self._pending:
            if id(number) in given and not check.users:
                self._asked.pop(number.traced_node(), None)
                self.graph.erase_node(check)
        self._pending.clear()

    def refused(self, what: str, instead: str = "") -> OtherNetworkError:
        """The error for something that no graph can do, with the line of the forward that does it.

        Args:
            what: what the forward does.
            instead: what the user can do or write in its place.
        """
        frame = sys._getframe(1)
        if in_checkpoint(frame):  # checkpointing asks many questions that the forward does not ask
            what, instead = "is checkpointed", CHECKPOINT
        return OtherNetworkError(f"its forward {what}{place_of(frame)}", instead)

    def holds_number(self, args: Any) -> bool:
        """Whether a number of the trace is among the arguments."""
        return any(type(v) in (Int, Scalar) for v in all_leaves(args))

    def holds_traced(self, args: Any) -> bool:
        """Whether anything of the trace is among the arguments."""
        return any(isinstance(v, Tensor) or issubclass(type(v), Traced) for v in all_leaves(args))


_CONSTANTS: tuple[type, ...] = (
    str,
    int,
    float,
    complex,
    enum.Enum,
    torch.memory_format,
    torch.layout,
)
_CONSTANTS += (torch._ops.OpOverload,)


def rebuilt_with(value: Any, of_item: Callable[[Any, Any], Any]) -> Any:
    if isinstance(value, dict):
        return type(value)((k, of_item(k, v)) for k, v in value.items())
    items = [of_item(i, v) for i, v in enumerate(value)]
    if isinstance(value, list):
        return items
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items) if type(value).__module__ == "torch.return_types" else tuple(items)


def _switch_gradients(on: bool) -> None:
    with without_torch_functions():  # or every mode would see it, which takes much longer
        torch.set_grad_enabled(on)


def node_made(node: Made) -> fx.Node:
    return node if isinstance(node, fx.Node) else node()


def _call_later(
    builder: GraphBuilder, function: Callable[..., Any], node: fx.Node, key: Any
) -> Callable[[], fx.Node]:
    return lambda: builder.node_of("call_function", function, (node, key))
