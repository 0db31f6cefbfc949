"""The arguments of a traced forward: one placeholder for each parameter, named as in the source."""

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from se_inject.graph.containers import holds_tensor
from se_inject.graph.expect import bind, expect
from se_inject.graph.recording.call import Call
from se_inject.graph.thread import OtherNetworkError
from se_inject.graph.tracing.nodes import GraphBuilder, Made, node_made, rebuilt_with


def placeholders(
    builder: GraphBuilder, root: nn.Module, call: Call
) -> tuple[list[Any], dict[str, Any]]:
    """Make a placeholder for each parameter, with its name and default in the source.

    Returns:
        the positional and the keyword arguments that the traced forward gets.
    """
    forward: Any = type(root).forward
    positional: list[Any] = []
    keyword: dict[str, Any] = {}
    parameters = inspect.signature(forward).parameters
    for name, value in bind(forward, root, call).items():
        parameter = parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            node = builder.graph.create_node("placeholder", f"*{name}", (), {})
            _expect_length(builder, node, value, name)
            positional += [
                _given(builder, builder.item(node, i), v, name) for i, v in enumerate(value)
            ]
        elif parameter.kind is parameter.VAR_KEYWORD:
            node = builder.graph.create_node("placeholder", f"**{name}", (), {})
            _expect_length(builder, node, value, name)
            keyword |= {
                k: _given(builder, builder.item(node, k), v, name) for k, v in value.items()
            }
        else:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            node = builder.graph.create_node("placeholder", name, default, {})
            stand_in = _given(builder, node, value, name)
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[name] = stand_in
            else:
                positional.append(stand_in)
    return positional, keyword


def _given(builder: GraphBuilder, node: Made, value: Any, name: str) -> Any:
    """What the forward sees in place of an argument.

    Flags and absent arguments decide which path the code takes. So they stay as they are, and the
    graph checks them. Numbers and sizes stay open, so that other sizes work too.
    """
    if value is None or isinstance(value, bool | str):
        builder.node_of("call_function", expect, (node_made(node), value, name))
        return value
    if isinstance(value, Tensor):
        return builder.register(node, value.detach())
    if isinstance(value, list | tuple | dict) and (holds_tensor(value) or is_symbolic(value)):
        made = node_made(node)
        if holds_tensor(value):
            _expect_length(builder, made, value, name)
        return rebuilt_with(value, lambda key, v: _given(builder, builder.item(made, key), v, name))
    if is_symbolic(value) or isinstance(value, torch.device | torch.dtype):
        return builder.wrapped(node, value)
    raise OtherNetworkError(
        f"its argument {name!r} is a {type(value).__name__}, which may decide its way",
        "pass tensors, numbers and flags (example_input= chooses what the model is called with)",
    )


def _expect_length(builder: GraphBuilder, node: fx.Node, value: Any, name: str) -> None:
    length = builder.node_of("call_function", len, (node,))
    builder.node_of("call_function", expect, (length, len(value), f"len({name})"))


def is_symbolic(value: Any) -> bool:
    """Whether a value is a number, or a size made of numbers, which may differ between calls."""
    if isinstance(value, tuple | list):
        return all(map(is_symbolic, value))
    return isinstance(value, int | float) and not isinstance(value, bool)
