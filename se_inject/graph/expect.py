"""The checks that the forward of an injected block makes in every call."""

import inspect
import operator
from typing import Any

from torch import fx

from se_inject.graph.recording.call import Call


def expect(value: Any, recorded: Any, argument: str) -> None:
    """Stop a call that would need another path through the forward than the recorded one."""
    if value is not recorded and value != recorded:
        raise RuntimeError(
            f"argument {argument!r} was {recorded!r} when the SE block was inserted; this block"
            f" now serves no other value. remove_se(model) brings back its own forward."
        )


def expect_answer(value: Any, recorded: Any, question: str) -> None:
    """The same check for what the forward asks about its sizes and numbers."""
    if value is not recorded and value != recorded:
        raise RuntimeError(
            f"`{question}` was {recorded!r} when the SE block was inserted, and the forward asks"
            f" for it; this block now serves no other answer (here {value!r}). remove_se(model)"
            " brings back its own forward."
        )


_SIGNS = {operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<="}
_SIGNS |= {operator.gt: ">", operator.ge: ">=", operator.add: "+", operator.sub: "-"}
_SIGNS |= {operator.mul: "*", operator.truediv: "/", operator.floordiv: "//", operator.mod: "%"}


def question_of(value: Any, depth: int = 5) -> str:
    """A node in the form in which people would write it: ``x.shape[1] == 16``."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "placeholder":
        return str(value.target).lstrip("*")
    if value.op == "get_attr":
        return f"self.{value.target}"
    if depth == 0:
        return value.name
    parts = [question_of(arg, depth - 1) for arg in value.args]
    if value.op == "call_module":
        return f"self.{value.target}(...)"
    if value.op == "call_method":
        return f"{parts[0]}.{value.target}({', '.join(parts[1:])})"
    if value.target in _SIGNS and len(parts) == 2:
        return f"{parts[0]} {_SIGNS[value.target]} {parts[1]}"
    if value.target is getattr:
        return f"{parts[0]}.{value.args[1]}"
    if value.target is operator.getitem:
        return f"{parts[0]}[{parts[1]}]"
    if value.target is operator.truth:
        return parts[0]
    return f"{getattr(value.target, '__name__', value.target)}({', '.join(parts)})"


def bind(forward: Any, module: Any, call: Call) -> dict[str, Any]:
    """The arguments of a recorded call by parameter name, with the defaults filled in."""
    bound = inspect.signature(forward).bind(module, *call.args, **call.kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])
