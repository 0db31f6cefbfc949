"""The devices, dtypes and memory layouts of a trace."""

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from se_inject.graph.tracing.shape import plain
from se_inject.graph.tracing.values import Traced, stray

if TYPE_CHECKING:
    from se_inject.graph.tracing.nodes import GraphBuilder


class Machine(Traced):
    """A device, a dtype or a memory layout. After the model is moved, it is another one.

    It may be handed on (``torch.zeros(n, device=x.device)``) and is read again in every call. A
    forward that chooses its path by it is refused, because a graph has only one path.
    """

    __torch_function__: Any = classmethod(stray)

    def __init__(
        self, tracer: "GraphBuilder", node: fx.Node | Callable[[], fx.Node], value: Any, what: str
    ) -> None:
        super().__init__(tracer, node, value)
        self._what = what

    # Python answers isinstance by a property of this name, but mypy knows only an attribute.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._value)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise self._tracer.refused(
            f"takes its way by the {self._what} of a tensor",
            "write one way that serves all",
        )

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
            return self._tracer.apply(function, (self, other))  # both are moved together
        return self._derived(function, (self, other), function(self._value, plain(other)))

    def _derived(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Any:
        node = functools.partial(self._tracer.node_of, "call_function", function, args)
        return Machine(self._tracer, node, value, self._what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("is_floating_point", "is_complex"):  # moving a model changes neither of them
            return self._tracer.apply(getattr, (self, name))
        return self._derived(getattr, (self, name), getattr(self._value, name))
