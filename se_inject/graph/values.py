"""What a traced forward sees in place of sizes, numbers and properties of tensors.

Each value knows its node in the graph and what it was in the recorded call. Arithmetic on it goes
into the graph, so that other sizes work. Where Python needs the value itself (``if h % 2``,
``range(h)``, a key of a dict), it gets the recorded one, and the graph checks in every call that
the answer is still the same.
"""

import dis
import functools
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from se_inject.graph.tracer import BlockTracer


class Traced:
    """A value that a node of the graph computes."""

    def __init__(
        self, tracer: "BlockTracer", node: fx.Node | Callable[[], fx.Node], value: Any
    ) -> None:
        self._tracer, self._node, self._value = tracer, node, value

    def traced_node(self) -> fx.Node:
        """The node; made only where somebody uses the value."""
        if not isinstance(self._node, fx.Node):
            self._node = self._node()
        return self._node

    def recorded_value(self) -> Any:
        """What it was in the recorded call."""
        return self._value


class _Number(Traced):
    """What numbers and truth values have in common."""

    def _ask(self) -> Any:
        self._tracer.expect(self.traced_node(), self._value)
        return self._value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``isinstance(h, int)`` is answered as for the number itself."""
        return type(self._value)

    def __bool__(self) -> bool:
        if isinstance(self._value, bool):
            return bool(self._ask())
        return bool(self._tracer.apply(operator.truth, (self,)))

    def __int__(self) -> int:
        return int(self._ask())

    def __float__(self) -> float:
        return float(self._ask())

    def __hash__(self) -> int:
        return hash(self._ask())

    def __str__(self) -> str:
        return str(self._ask())

    def __format__(self, spec: str) -> str:
        return format(self._ask(), spec)

    def __repr__(self) -> str:
        return repr(self._value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._ask(), name)  # is_integer, bit_length and the like


def _stray(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Torch takes what has a ``__torch_function__`` as any argument; the tracer's mode is first."""
    raise TypeError(f"{func} is called out of the trace that its argument is from")


class Int(_Number):
    """A whole number, such as a size.

    Torch takes it in lists of sizes (``x.view(n, -1)``) through ``__index__``, and gives the
    tracer's mode the object itself. A ``__torch_function__`` would be in the way of that.
    """

    def __index__(self) -> int:
        return self._tracer.index(self)


class Scalar(_Number):
    """A float or a truth value."""

    __torch_function__: Any = classmethod(_stray)


class Machine(Traced):
    """A device, a dtype or a memory layout: another one after the model was moved.

    It may be handed on (``torch.zeros(n, device=x.device)``), and is read in every call. A forward
    that takes its way by it is refused: a graph has only one way.
    """

    __torch_function__: Any = classmethod(_stray)

    def __init__(
        self, tracer: "BlockTracer", node: fx.Node | Callable[[], fx.Node], value: Any, what: str
    ) -> None:
        super().__init__(tracer, node, value)
        self._what = what

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._value)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise self._tracer.refused(f"takes its way by the {self._what} of a tensor")

    __bool__ = __hash__ = __str__ = __format__ = __int__ = __index__ = __float__ = _refuse
    __call__ = __iter__ = __len__ = __contains__ = __getitem__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __mod__ = _refuse

    def __repr__(self) -> str:
        return f"<{self._what}>"

    def __eq__(self, other: object) -> Any:
        return self._compared(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compared(operator.ne, other)

    def _compared(self, function: Callable[..., Any], other: object) -> Any:
        if self._what == "device" and type(other) is Machine and other._what == "device":
            return self._tracer.apply(function, (self, other))  # they are moved together
        return self._derived(function, (self, other), function(self._value, plain(other)))

    def _derived(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Any:
        node = functools.partial(self._tracer.node_of, "call_function", function, args)
        return Machine(self._tracer, node, value, self._what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("is_floating_point", "is_complex"):  # moving a model changes neither
            return self._tracer.apply(getattr, (self, name))
        return self._derived(getattr, (self, name), getattr(self._value, name))


class Shape(tuple[Any, ...]):
    """The sizes of a tensor: a tuple of :class:`Int` that is one node too."""

    _tracer: "BlockTracer"
    _node: fx.Node | Callable[[], fx.Node]

    @classmethod
    def of(
        cls, tracer: "BlockTracer", node: fx.Node | Callable[[], fx.Node], sizes: torch.Size
    ) -> "Shape":
        def item(index: int) -> Callable[[], fx.Node]:
            return lambda: tracer.node_of("call_function", operator.getitem, (shape, index))

        shape = cls(Int(tracer, item(i), size) for i, size in enumerate(sizes))
        shape._tracer, shape._node = tracer, node
        return shape

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Size

    def traced_node(self) -> fx.Node:
        if not isinstance(self._node, fx.Node):
            self._node = self._node()
        return self._node

    def recorded_value(self) -> torch.Size:
        return torch.Size(plain(item) for item in tuple.__iter__(self))

    def __len__(self) -> int:
        self._tracer.apply(len, (self,))._ask()
        return tuple.__len__(self)

    def __iter__(self) -> Iterator[Any]:
        if not is_unpacked(sys._getframe(1)):  # which fails by itself where the rank is another
            len(self)
        return tuple.__iter__(self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._tracer.apply(operator.getitem, (self, index))
        index = operator.index(index)
        if index < 0:  # counted from the end, as the forward says it
            return self._tracer.apply(operator.getitem, (self, index))
        return tuple.__getitem__(self, index)

    def numel(self) -> Any:
        return math.prod(tuple.__iter__(self))

    def __eq__(self, other: object) -> Any:
        return self._tracer.apply(operator.eq, (self, other))

    def __ne__(self, other: object) -> Any:
        return self._tracer.apply(operator.ne, (self, other))

    def __hash__(self) -> int:
        return hash(tuple(tuple.__iter__(self)))

    def __add__(self, other: Any) -> Any:
        return tuple(tuple.__iter__(self)) + tuple(other)

    def __radd__(self, other: Any) -> Any:
        return tuple(other) + tuple(tuple.__iter__(self))


def plain(value: Any) -> Any:
    """The recorded value of a traced one; containers of them too."""
    kind = type(value)
    if issubclass(kind, Traced | Shape):
        return value.recorded_value()
    if kind is tuple or kind is list:
        return kind([plain(v) for v in value])
    if kind is dict:
        return {k: plain(v) for k, v in value.items()}
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*map(plain, value))
    return value


def is_unpacked(frame: types.FrameType) -> bool:
    """Whether the frame takes the value apart at once: ``n, c, h, w = x.shape``."""
    return _opcode(frame) == "UNPACK_SEQUENCE"


def _opcode(frame: types.FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Traced, *others: Any) -> Any:
        return self._tracer.apply(function, (self, *others))

    return method


def _reflected(function: Callable[..., Any], in_place: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Traced, other: Any) -> Any:
        # ``x *= n`` of a tensor ends here too, since torch does not know the number.
        frame = sys._getframe(1)
        statement = _opcode(frame) == "BINARY_OP" and frame.f_code.co_code[frame.f_lasti + 1] >= 13
        return self._tracer.apply(in_place if statement else function, (other, self))

    return method


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in (*_BINARY, *_COMPARISONS, "neg", "pos", "abs", "invert"):
    setattr(_Number, f"__{_name.strip('_')}__", _operator(getattr(operator, _name)))
for _name in _BINARY:
    _function, _in_place = getattr(operator, _name), getattr(operator, f"i{_name.strip('_')}")
    setattr(_Number, f"__r{_name.strip('_')}__", _reflected(_function, _in_place))
for _function in (math.ceil, math.floor, math.trunc, round, divmod):
    setattr(_Number, f"__{_function.__name__}__", _operator(_function))
