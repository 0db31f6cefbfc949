"""The forward of a block whose SE block scales the map that the block returns.

Such a block first runs the forward of its class as it is. An attribute that this forward reads
(``inplace`` of an activation, ``momentum`` of a norm) can therefore be changed later, as in the
base network:

    def forward(self, input):
        return self.se(self.forward_without_se(input))

The generated class has the forward of its base under this second name, because TorchScript knows
the methods of ``self`` but not ``super()``.
"""

import ast
import functools
import types
from collections.abc import Sequence
from typing import Any

from se_inject.edit.site import Site
from se_inject.graph.facts import TracedForward
from se_inject.graph.source import ForwardSource

BASE_FORWARD = "forward_without_se"


def source_around(
    forward: TracedForward, sites: Sequence[Site], label: str
) -> ForwardSource | None:
    """The forward of such a block as text, or None if it cannot have this form."""
    if len(sites) != 1 or sites[0].kind != "unit":
        return None
    for place in sites[0].where:
        if any(reader.op != "output" or reader.args != (place.source,) for reader in place.readers):
            return None
    source = ForwardSource.of(forward.graph, label)
    function = ast.parse(source.text).body[-1]
    assert isinstance(function, ast.FunctionDef)
    inputs = function.args
    if inputs.vararg or inputs.kwarg or inputs.kwonlyargs or inputs.posonlyargs:
        return None
    names = ", ".join(each.arg for each in inputs.args[1:])
    body = f"return self.{sites[0].child}(self.{BASE_FORWARD}({names}))"
    text = f"def forward({ast.unparse(inputs)}):\n    {body}\n"
    return ForwardSource(text, source.names, label)


def renamed(forward: Any) -> Any:
    """A copy of a forward under its second name. TorchScript reads the name of the function."""
    if not isinstance(forward, types.FunctionType):
        return forward
    function = types.FunctionType(
        forward.__code__,
        forward.__globals__,
        BASE_FORWARD,
        forward.__defaults__,
        forward.__closure__,
    )
    functools.update_wrapper(function, forward, assigned=("__module__", "__doc__"))
    function.__kwdefaults__ = forward.__kwdefaults__
    function.__annotations__ = forward.__annotations__
    del function.__wrapped__  # type: ignore[attr-defined]  # it would give tools the other name
    return function
