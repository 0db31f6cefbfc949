"""The sizes of a tensor in a trace, and the recorded values of everything that is traced."""

import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from se_inject.graph.frames import is_unpacked
from se_inject.graph.tracing.number import Int
from se_inject.graph.tracing.values import Traced

if TYPE_CHECKING:
    from se_inject.graph.tracing.nodes import GraphBuilder


class Shape(tuple[Any, ...]):
    """The sizes of a tensor: a tuple of :class:`Int` that also has a node of its own."""

    _tracer: "GraphBuilder"
    _node: fx.Node | Callable[[], fx.Node]

    @classmethod
    def of(
        cls, tracer: "GraphBuilder", node: fx.Node | Callable[[], fx.Node], sizes: torch.Size
    ) -> "Shape":
        def item(index: int) -> Callable[[], fx.Node]:
            return lambda: tracer.node_of("call_function", operator.getitem, (shape, index))

        shape = cls(Int(tracer, item(i), size) for i, size in enumerate(sizes))
        shape._tracer, shape._node = tracer, node
        return shape

    # Python answers isinstance by a property of this name, but mypy knows only an attribute.
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
        if not is_unpacked(sys._getframe(1)):  # unpacking fails by itself if the rank is another
            len(self)
        return tuple.__iter__(self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._tracer.apply(operator.getitem, (self, index))
        index = operator.index(index)
        if index < 0:  # the graph counts from the end too, as the forward does
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
    """The recorded value of a traced value, or of each one in a container."""
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
