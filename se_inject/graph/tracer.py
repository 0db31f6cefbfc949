"""Traces the forward of one block, every child a leaf, into a ``torch.fx`` graph.

The forward runs on meta tensors of the recorded shapes, under a mode that sees every function of
torch that it calls and writes it into the graph. Tensors are real tensors here, so what Python
asks about them is answered as ever; sizes and numbers are values of :mod:`se_inject.graph.values`.
Modes belong to one thread, so no other thread notices.
"""

import dataclasses
import enum
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from se_inject.graph.expect import bind, expect, expect_answer, question_of
from se_inject.graph.log import GUESSES, leaves, run_on_meta
from se_inject.graph.planning import (
    THREAD,
    OtherNetworkError,
    in_checkpoint,
    is_of_torch,
    place_of,
)
from se_inject.graph.record import Call
from se_inject.graph.values import Int, Machine, Scalar, Shape, Traced, plain
from se_inject.graph.watch import watched
from se_inject.torch_private import pytree

# Methods of Tensor that are operators in people's code, and read better so in a forward's text.
_OPERATORS: dict[str, Callable[..., Any]] = {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "matmul", "neg", "pow")},
    **{f"{n}_": getattr(operator, f"i{n}") for n in ("add", "sub", "mul")},
    "div": operator.truediv,
    "div_": operator.itruediv,
    "true_divide": operator.truediv,
    **{n: getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
}
_SIZES = {"dim", "ndimension", "size", "numel", "nelement", "__len__"}
_KINDS = {"is_floating_point", "is_complex", "is_signed"}
_PLACES = {"get_device": "device", "data_ptr": "memory", "stride": "memory layout"}
_PLACES |= {"storage_offset": "memory layout", "is_contiguous": "memory layout", "type": "dtype"}
_PLACES |= {"element_size": "dtype", "is_pinned": "memory", "is_shared": "memory"}
_PROPERTIES = {"device": "device", "dtype": "dtype", "layout": "memory layout"}
_PROPERTIES |= {"requires_grad": "gradient", "grad_fn": "gradient", "is_leaf": "gradient"}
_VALUES = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}
_VALUES |= {"__contains__", "__array__", "equal", "allclose", "nonzero", "__complex__"}
_ASIDE = {"__repr__", "__format__", "__hash__", "__str__"}  # what a log message may need
# Where how many parts come out may depend on a size.
_PARTS = {"split", "chunk", "tensor_split", "unbind", "hsplit", "vsplit", "dsplit", "unsafe_chunk"}


class BlockTracer(TorchFunctionMode):
    """Traces one module's own forward for one recorded call; every child is a leaf."""

    def __init__(self, name: str, call: Call) -> None:
        super().__init__()
        self.name = name
        self.call = call
        self.children = {child: iter(calls) for child, calls in call.children.items()}
        self.mode_readers: list[nn.Module] = []
        self.quiet = 0  # more than 0: what runs is not the forward's own
        self.graph = fx.Graph()
        self._nodes: dict[int, tuple[Tensor, fx.Node | Callable[[], fx.Node]]] = {}
        self._paths: dict[int, str] = {}
        self._modules: dict[int, str] = {}
        self._got: dict[str, fx.Node] = {}
        self._asked: dict[fx.Node, fx.Node] = {}
        self._pending: list[tuple[Int, fx.Node]] = []

    def trace(self, root: nn.Module) -> fx.Graph:
        """The graph of the root's forward in the mode that it is in."""
        self._root = root
        self._forward = type(root).forward
        for path, module in root.named_modules():
            self._modules.setdefault(id(module), path)
            for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
                if isinstance(value, Tensor):
                    self._paths.setdefault(id(value), f"{path}.{name}".lstrip("."))
        positional, keyword = self._arguments()
        try:
            # With gradients on, so that a forward that switches them off is seen.
            with torch.enable_grad(), self:
                THREAD.tracer = self
                output = watched(lambda: self._forward(root, *positional, **keyword))
        finally:
            THREAD.tracer = None
        self.graph.create_node("output", "output", (self.argument(output),), {})
        return self.graph

    # --- arguments of the forward --------------------------------------------------------------

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """One placeholder a parameter, named and defaulted as in the source."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        parameters = inspect.signature(self._forward).parameters
        for name, value in bind(self._forward, self._root, self.call).items():
            parameter = parameters[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                node = self.graph.create_node("placeholder", f"*{name}", (), {})
                self._expect_length(node, value, name)
                positional += [
                    self._given(self._item(node, i), v, name) for i, v in enumerate(value)
                ]
            elif parameter.kind is parameter.VAR_KEYWORD:
                node = self.graph.create_node("placeholder", f"**{name}", (), {})
                self._expect_length(node, value, name)
                keyword |= {k: self._given(self._item(node, k), v, name) for k, v in value.items()}
            else:
                default = () if parameter.default is parameter.empty else (parameter.default,)
                node = self.graph.create_node("placeholder", name, default, {})
                stand_in = self._given(node, value, name)
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keyword[name] = stand_in
                else:
                    positional.append(stand_in)
        return positional, keyword

    def _given(self, node: fx.Node | Callable[[], fx.Node], value: Any, name: str) -> Any:
        """What the forward sees in place of an argument.

        Flags and absent arguments decide which way the code goes, so they are themselves, and the
        graph checks them; numbers and sizes stay open, so that other sizes work too.
        """
        if value is None or isinstance(value, bool | str):
            self.node_of("call_function", expect, (_made(node), value, name))
            return value
        if isinstance(value, Tensor):
            return self._register(node, value.detach())
        if isinstance(value, list | tuple | dict) and (holds_tensor(value) or is_symbolic(value)):
            made = _made(node)
            if holds_tensor(value):
                self._expect_length(made, value, name)
            return _rebuilt(value, lambda key, v: self._given(self._item(made, key), v, name))
        if is_symbolic(value) or isinstance(value, torch.device | torch.dtype):
            return self.wrapped(node, value)
        raise OtherNetworkError(
            f"its argument {name!r} is a {type(value).__name__}, which may decide its way"
        )

    def _expect_length(self, node: fx.Node, value: Any, name: str) -> None:
        length = self.node_of("call_function", len, (node,))
        self.node_of("call_function", expect, (length, len(value), f"len({name})"))

    # --- nodes ---------------------------------------------------------------------------------

    def node_of(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> fx.Node:
        """A new node of the graph."""
        arguments = self.argument(args), self.argument(dict(kwargs or {}))
        self._pending.clear()
        return self.graph.create_node(op, target, *arguments)

    def _item(self, node: fx.Node, key: Any) -> Callable[[], fx.Node]:
        return lambda: self.node_of("call_function", operator.getitem, (node, key))

    def apply(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> Any:
        """Call a function in the graph, and here with the recorded values."""
        return self._call("call_function", function, function, args, kwargs or {})

    def _call(
        self, op: str, target: Any, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        node = self.node_of(op, target, args, kwargs)
        inputs = {id(t): t for t in _all_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.quiet += 1
        try:
            with torch.no_grad():
                value = run_on_meta(function, plain(tuple(args)), plain(dict(kwargs)))
        finally:
            self.quiet -= 1
        return self.wrapped(node, value, inputs)

    def wrapped(
        self,
        node: fx.Node | Callable[[], fx.Node],
        value: Any,
        inputs: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """What the forward sees of a node's value."""
        if isinstance(value, Tensor):
            # An in-place operation returns its input, which has a node of its own already.
            return self._register(
                node, self._alias(value) if id(value) in (inputs or {}) else value
            )
        if isinstance(value, torch.Size):
            return Shape.of(self, node, value)
        if isinstance(value, bool | float):
            return Scalar(self, node, value)
        if isinstance(value, int):
            return Int(self, node, value)
        if isinstance(value, torch.device | torch.dtype | torch.layout):
            return Machine(self, node, value, _PROPERTIES.get(type(value).__name__, "dtype"))
        if isinstance(value, list | tuple) or type(value) in (dict, OrderedDict):
            made = _made(node)
            return _rebuilt(value, lambda key, v: self.wrapped(self._item(made, key), v, inputs))
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            made = _made(node)
            items = value.items() if isinstance(value, Mapping) else vars(value).items()
            get = operator.getitem if isinstance(value, Mapping) else getattr
            for key, item in items:
                if isinstance(item, Tensor):
                    self._register(_call_later(self, get, made, key), item)
        return value

    def _register(self, node: fx.Node | Callable[[], fx.Node], tensor: Tensor) -> Tensor:
        self._nodes[id(tensor)] = (tensor, node)
        return tensor

    def _alias(self, tensor: Tensor) -> Tensor:
        """Another name of the same tensor, so that the two can have different nodes."""
        self.quiet += 1
        try:
            return tensor.detach()
        finally:
            self.quiet -= 1

    def node_of_tensor(self, tensor: Tensor) -> fx.Node:
        """Where a tensor comes from: another node, or an attribute of the block."""
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
                " (from NumPy, by TorchScript or torch.Tensor(...), or kept in a list)"
            )
        if path not in self._got:
            self._got[path] = self.graph.create_node("get_attr", path, (), {})
        return self._got[path]

    def argument(self, a: Any) -> Any:
        """An argument of a node."""
        kind = type(a)
        if isinstance(a, fx.Node):
            return a
        if issubclass(kind, Traced | Shape):
            return a.traced_node()
        if isinstance(a, Tensor):
            return self.node_of_tensor(a)
        if isinstance(a, numpy.generic):  # the code of a graph is what its arguments print
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
        raise self.refused(f"hands on a {kind.__name__}, which a graph cannot hold")

    def _own(self, value: torch.device | torch.dtype) -> Any:
        """A device or dtype that is an attribute of the block is read anew in every call."""
        names = self._forward.__code__.co_names
        for name, own in vars(self._root).items():
            if type(own) is type(value) and own == value and name in names:
                return self.graph.create_node("get_attr", name, (), {})
        if value == torch.device("meta"):
            raise self.refused("has a device in it that only the copy on meta has")
        return value

    # --- questions -----------------------------------------------------------------------------

    def expect(self, node: fx.Node, value: Any) -> fx.Node:
        """Have the graph check that a question has the recorded answer."""
        if node not in self._asked:
            question = question_of(node)
            self._asked[node] = self.node_of(
                "call_function", expect_answer, (node, value, question)
            )
        return self._asked[node]

    def index(self, number: Int) -> int:
        """The number where C code needs it; if a function of torch, the graph gives it the node."""
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
        """The function that asked for indices is in the graph itself, with the nodes."""
        given = {id(v) for v in _all_leaves((args, kwargs))}
        for number, check in self._pending:
            if id(number) in given and not check.users:
                self._asked.pop(number.traced_node(), None)
                self.graph.erase_node(check)
        self._pending.clear()

    def refused(self, what: str) -> OtherNetworkError:
        """The error for what no graph can do, with the line of the forward that does it."""
        frame = sys._getframe(1)
        if in_checkpoint(frame):  # which asks a lot that is no question of the forward's
            what = "is checkpointed"
        return OtherNetworkError(f"its forward {what}{place_of(frame)}")

    def holds_number(self, args: Any) -> bool:
        """Whether a whole number of the trace is among the arguments."""
        return any(type(v) is Int for v in _all_leaves(args))

    def holds_traced(self, args: Any) -> bool:
        """Whether anything of the trace is among the arguments."""
        return any(isinstance(v, Tensor) or issubclass(type(v), Traced) for v in _all_leaves(args))

    # --- what the forward calls ----------------------------------------------------------------

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
            return run_on_meta(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        method = torch.overrides.is_tensor_method_or_property(func)
        self._drop_pending(args, kwargs)
        if func is torch._C._set_grad_enabled:
            raise self.refused("switches gradients on or off")
        if name in _ASIDE:
            return func(*plain(args), **plain(dict(kwargs)))
        if func in GUESSES or (name in _VALUES and (method or name in ("equal", "allclose"))):
            raise self.refused("asks a tensor for its values")
        if name == "__set__":
            raise self.refused(f"sets .{func.__self__.__name__} of a tensor")  # type: ignore[attr-defined]
        if name == "__get__":
            return self._attribute(args[0], func.__self__.__name__)  # type: ignore[attr-defined]
        if name in _PLACES and method and not (name == "type" and (len(args) > 1 or kwargs)):
            value = run_on_meta(func, plain(args), plain(dict(kwargs)))
            return self._machine("call_method", name, args, kwargs, value, _PLACES[name])
        value = self._operation(func, name, method, args, kwargs)
        if name == "__len__":
            return value.__index__()
        if name in _PARTS and not is_unpacked_next(_user_frame(frame)):
            self.expect(self.node_of("call_function", len, (self._last,)), len(value))
        return value

    def _operation(
        self, func: Callable[..., Any], name: str, method: bool, args: Any, kwargs: Any
    ) -> Any:
        op, given = "call_function", args
        target: Any = func
        if method:
            if name in _OPERATORS and len(args) <= 2 and not kwargs:
                target = _OPERATORS[name]
            elif name in ("__getitem__", "__setitem__", "__len__"):
                target = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}.get(
                    name, len
                )
            elif name.startswith("__r") and hasattr(operator, f"__{name[3:]}"):
                target, given = getattr(operator, f"__{name[3:]}"), args[::-1]
            elif name == "__rdiv__":
                target, given = operator.truediv, args[::-1]
            elif name.startswith("__") and hasattr(operator, name):
                target = getattr(operator, name)
            else:
                op, target = "call_method", name
        node = self.node_of(op, target, given, kwargs)
        self._last = node
        inputs = {id(t): t for t in _all_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.quiet += 1
        try:
            with torch.no_grad():
                value = run_on_meta(func, plain(tuple(args)), plain(dict(kwargs)))
        finally:
            self.quiet -= 1
        return self.wrapped(node, value, inputs)

    def _attribute(self, tensor: Tensor, name: str) -> Any:
        self.quiet += 1
        try:
            with torch.no_grad():
                value = run_on_meta(getattr, (tensor, name), {})
        finally:
            self.quiet -= 1
        source = self.node_of_tensor(tensor)
        if isinstance(value, Tensor):
            node = self.node_of("call_function", getattr, (source, name))
            return self._register(node, self._alias(value) if value is tensor else value)

        def later() -> fx.Node:
            return self.node_of("call_function", getattr, (source, name))

        if name in ("shape", "ndim"):
            return self.wrapped(later, value)
        if value is None and name not in _PROPERTIES:
            return None
        return Machine(self, later, value, _PROPERTIES.get(name, f"property .{name}"))

    def _machine(self, op: str, target: Any, args: Any, kwargs: Any, value: Any, what: str) -> Any:
        node = self.node_of(op, target, args, kwargs)
        return Machine(self, node, value, what)

    def call_module(
        self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A child's output, as it was recorded; a layer made in the forward is a part of it."""
        path = self._modules.get(id(module))
        if path is None:
            return original(module, *args, **kwargs)
        if not path:
            raise self.refused("calls itself")
        node = self.node_of("call_module", path, args, kwargs)
        name = f"{self.name}.{path}".lstrip(".")
        call = next(self.children.get(name, iter(())), None)
        inputs = {id(t): t for t in _all_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if call is None:
            self.quiet += 1
            try:
                with torch.no_grad():
                    value = original(module, *plain(tuple(args)), **plain(dict(kwargs)))
            finally:
                self.quiet -= 1
        else:
            recorded = [t for t in leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
            value = _of_recorded(call.output, recorded, list(inputs.values()), self._alias)
        return self.wrapped(node, value, inputs)


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


def _of_recorded(
    output: Any, recorded: list[Tensor], given: list[Tensor], alias: Callable[[Tensor], Tensor]
) -> Any:
    """The recorded output with tensors of its own; an input that came out again is that input."""

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        same = [g for r, g in zip(recorded, given, strict=False) if r is leaf]
        return same[0] if same else alias(leaf)

    return pytree.tree_map(fresh, output)


def _rebuilt(value: Any, of_item: Callable[[Any, Any], Any]) -> Any:
    if isinstance(value, dict):
        return type(value)((k, of_item(k, v)) for k, v in value.items())
    items = [of_item(i, v) for i, v in enumerate(value)]
    if isinstance(value, list):
        return items
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items) if type(value).__module__ == "torch.return_types" else tuple(items)


def _made(node: fx.Node | Callable[[], fx.Node]) -> fx.Node:
    return node if isinstance(node, fx.Node) else node()


def _call_later(
    tracer: BlockTracer, function: Callable[..., Any], node: fx.Node, key: Any
) -> Callable[[], fx.Node]:
    return lambda: tracer.node_of("call_function", function, (node, key))


def _all_leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in tuple.__iter__(value) if isinstance(value, tuple) else value:
            yield from _all_leaves(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _all_leaves(item)
    else:
        yield value


def _user_frame(frame: Any) -> Any:
    while frame is not None and is_of_torch(frame):
        frame = frame.f_back
    return frame


def is_unpacked_next(frame: Any) -> bool:
    """Whether the frame takes apart at once what the function that it now calls returns."""
    if frame is None:
        return False
    import dis

    after = [i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti]
    step = next((i for i in after if i.opname not in ("CACHE", "PRECALL", "CALL")), None)
    return step is not None and step.opname == "UNPACK_SEQUENCE"


def holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def is_symbolic(value: Any) -> bool:
    """A number, or a size made of numbers: it may differ from call to call."""
    if isinstance(value, tuple | list):
        return all(map(is_symbolic, value))
    return isinstance(value, int | float) and not isinstance(value, bool)
