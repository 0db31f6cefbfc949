"""What the functions of torch mean to a trace: a node of the graph, a question, or nothing."""

import operator
from collections.abc import Callable
from typing import Any

# These methods of Tensor are operators in people's code, and are easier to read in that form.
_OPERATORS: dict[str, Callable[..., Any]] = {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "matmul", "neg", "pow")},
    **{f"{n}_": getattr(operator, f"i{n}") for n in ("add", "sub", "mul")},
    "div": operator.truediv,
    "div_": operator.itruediv,
    "true_divide": operator.truediv,
    **{n: getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
}
SIZES = {"dim", "ndimension", "size", "numel", "nelement", "__len__"}
KINDS = {"is_floating_point", "is_complex", "is_signed"}
PLACES = {"get_device": "device", "data_ptr": "memory", "stride": "memory layout"}
PLACES |= {"storage_offset": "memory layout", "is_contiguous": "memory layout", "type": "dtype"}
PLACES |= {"element_size": "dtype", "is_pinned": "memory", "is_shared": "memory"}
PROPERTIES = {"device": "device", "dtype": "dtype", "layout": "memory layout"}
PROPERTIES |= {"requires_grad": "gradient", "grad_fn": "gradient", "is_leaf": "gradient"}
VALUES = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}
VALUES |= {"__contains__", "__array__", "equal", "allclose", "nonzero", "__complex__"}
ASIDE = {"__repr__", "__format__", "__hash__", "__str__"}  # a log message may need these
# The number of parts that these return may depend on a size.
PARTS = {"split", "chunk", "tensor_split", "unbind", "hsplit", "vsplit", "dsplit", "unsafe_chunk"}


def as_in_source(
    func: Callable[..., Any], name: str, method: bool, args: Any, kwargs: Any
) -> tuple[str, Any, Any]:
    """The kind of node, its target and its arguments, as people write the call: ``x + y``."""
    if not method:
        return "call_function", func, args
    if name in _OPERATORS and len(args) <= 2 and not kwargs:
        return "call_function", _OPERATORS[name], args
    if name in ("__getitem__", "__setitem__", "__len__"):
        named = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
        return "call_function", named.get(name, len), args
    if name.startswith("__r") and hasattr(operator, f"__{name[3:]}"):
        return "call_function", getattr(operator, f"__{name[3:]}"), args[::-1]
    if name == "__rdiv__":
        return "call_function", operator.truediv, args[::-1]
    if name.startswith("__") and hasattr(operator, name):
        return "call_function", getattr(operator, name), args
    return "call_method", name, args
