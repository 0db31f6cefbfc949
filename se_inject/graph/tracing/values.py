"""What a traced forward sees in place of sizes, numbers and properties of tensors.

Each value knows its node in the graph, and the value in the recorded call. Arithmetic on it goes
into the graph, so that other sizes work. If Python needs the value itself (``if h % 2``,
``range(h)``, a key of a dict), it gets the recorded one. The graph then checks in every call that
the answer is still the same.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from se_inject.graph.tracing.nodes import GraphBuilder


class Traced:
    """A value that a node of the graph computes."""

    def __init__(
        self, tracer: "GraphBuilder", node: fx.Node | Callable[[], fx.Node], value: Any
    ) -> None:
        self._tracer, self._node, self._value = tracer, node, value

    def traced_node(self) -> fx.Node:
        """The node. It is made only when somebody uses the value."""
        if not isinstance(self._node, fx.Node):
            self._node = self._node()
        return self._node

    def recorded_value(self) -> Any:
        """The value in the recorded call."""
        return self._value


def stray(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Refuse a call that the tracer did not see. Where it traces, its mode sees the call first.

    Torch accepts an object with a ``__torch_function__`` as any argument.
    """
    raise TypeError(f"{func} is called out of the trace that its argument is from")
