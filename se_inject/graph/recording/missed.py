"""Finds the modules that a forward may not have shown because it stopped early."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from se_inject.graph.recording.call import Call
from se_inject.layers.layout import KINDS, first_convolution


def missed_modules(
    twin: nn.Module, recorded: Mapping[str, Sequence[Call]], failed: str
) -> Iterator[str]:
    """The modules that convolve maps and did not run to their end.

    A detector stops while it picks boxes. Its heads take lists of maps, while a block takes one
    map. The modules that would run after them convolve but add nothing.
    """
    for name, module in twin.named_modules():
        own_forward = not type(module).forward.__module__.startswith("torch.nn.")
        if not own_forward or first_convolution(module) is None:
            continue
        calls = recorded.get(name)
        if calls is None:
            if _may_add(type(module)):
                yield name
        elif name and name == failed:
            arguments = (*calls[-1].args, *calls[-1].kwargs.values())
            if len([a for a in arguments if isinstance(a, Tensor) and a.dim() in KINDS]) == 1:
                yield name


def _may_add(kind: type[nn.Module]) -> bool:
    """Whether the source of a forward has an addition. Without a source, the answer is True."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
            return True
        if isinstance(node, ast.Attribute) and node.attr.startswith("add"):
            return True
    return False
