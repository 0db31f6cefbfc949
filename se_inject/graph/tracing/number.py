"""The numbers and truth values of a trace: sizes, and everything computed from them."""

import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy

from se_inject.graph.frames import is_statement
from se_inject.graph.tracing.values import Traced, stray


class Number(Traced):
    """What numbers and truth values have in common."""

    def _ask(self) -> Any:
        self._tracer.expect(self.traced_node(), self._value)
        return self._value

    # Python answers isinstance by a property of this name, but mypy knows only an attribute.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``isinstance(h, int)`` gets the same answer as for the number itself."""
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

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """NumPy (``np.sqrt(h)``) computes with the number of the recorded call."""
        return numpy.asarray(self._ask(), dtype)

    def __repr__(self) -> str:
        return repr(self._value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._ask(), name)  # is_integer, bit_length and the like


class Int(Number):
    """A whole number, such as a size.

    In lists of sizes (``x.view(n, -1)``), torch reads it through ``__index__`` and gives the object
    itself to the tracer's mode. A ``__torch_function__`` would prevent that.
    """

    def __index__(self) -> int:
        return self._tracer.index(self)


class Scalar(Number):
    """A float or a truth value."""

    __torch_function__: Any = classmethod(stray)


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Traced, *others: Any) -> Any:
        return self._tracer.apply(function, (self, *others))

    return method


def _reflected(function: Callable[..., Any], in_place: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Traced, other: Any) -> Any:
        # ``x *= n`` with a tensor x ends here too, because torch does not know the number.
        return self._tracer.apply(
            in_place if is_statement(sys._getframe(1)) else function, (other, self)
        )

    return method


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in (*_BINARY, *_COMPARISONS, "neg", "pos", "abs", "invert"):
    setattr(Number, f"__{_name.strip('_')}__", _operator(getattr(operator, _name)))
for _name in _BINARY:
    _function, _in_place = getattr(operator, _name), getattr(operator, f"i{_name.strip('_')}")
    setattr(Number, f"__r{_name.strip('_')}__", _reflected(_function, _in_place))
for _function in (math.ceil, math.floor, math.trunc, round, divmod):
    setattr(Number, f"__{_function.__name__}__", _operator(_function))
