"""Finds sums of parallel linear maps of one input that are meant to be folded into one layer."""

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from se_inject.graph.operations.ops import CHANNELS_FIRST_NORM
from se_inject.sites.additions import addition, operands
from se_inject.sites.flow import Flow, Step


def collapses(module: nn.Module, flow: Flow, split_point: Step | None, node: fx.Node) -> bool:
    """Whether an addition sums linear paths that somebody means to fold.

    That is so if the class of the block can fold itself, or if the sum has the form of RepVGG's:
    three terms or more, one of which is a bare norm of the input.
    """
    own = operands(flow, node)
    if not all(_is_linear(flow, split_point, term) for term in own):
        return False
    cls: Any = type(module)
    if folds(cls):
        return True
    last = _outermost(flow, node)
    if last not in flow.repvgg_rows:
        flow.repvgg_rows[last] = _is_repvgg(flow, *_row(flow, last))
    return flow.repvgg_rows[last]


def _is_linear(flow: Flow, split_point: Step | None, end: fx.Node) -> bool:
    return all(op.is_linear_in_map for op in flow.ops(flow.between(split_point, end)))


def _outermost(flow: Flow, node: fx.Node) -> fx.Node:
    """The last addition in the row of additions that ``node`` belongs to."""
    while True:
        readers = [n for n in node.users if n in flow.inputs and addition(flow, n) is not None]
        if len(readers) != 1 or len(node.users) != 1:
            return node
        node = readers[0]


def _row(flow: Flow, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The additions of a row and its terms: ``a``, ``b`` and ``c`` in ``(a + b) + c``."""
    additions, terms = [], []
    stack = [node]
    while stack:  # a row may be longer than Python's stack
        part = stack.pop()
        added = addition(flow, part) if part in flow.inputs else None
        if added is None:
            terms.append(part)
        else:
            additions.append(part)
            stack += [operand for operand in added[:2] if operand in flow.inputs]
    return additions, terms


def _is_repvgg(flow: Flow, additions: Sequence[fx.Node], terms: Sequence[fx.Node]) -> bool:
    """Whether all terms are linear paths, two or more have one convolution, and one a bare norm."""
    # Terms beside each other have no sum of the row on their way, as units one after another have.
    if len(terms) < 3 or flow.any_reaches(additions, terms):
        return False
    start: Step | None = terms[0]
    for term in terms[1:]:
        start = flow.meet(start, term)
    paths = [list(flow.ops(flow.between(start, term))) for term in terms]
    if not all(op.is_linear_in_map for ops in paths for op in ops):
        return False
    convolutions = [sum(op.is_convolution for op in ops) for ops in paths]
    norms = [any(op.name in CHANNELS_FIRST_NORM for op in ops) for ops in paths]
    bare = [norm and not n for norm, n in zip(norms, convolutions, strict=True)]
    return any(bare) and max(convolutions) == 1 and convolutions.count(1) >= 2


# The names of such methods in a dozen libraries. fuse_model is not one of them, because torch uses
# it for fusing a convolution with its own norm and activation before quantization.
_NAME = re.compile(
    r"re_?param|deploy|equivalent|(^|_)(fuse|fuses|fold|merge|collapse|absorb|slim)(_|$)"
    r"|(^|_)convert|convert$|(fuse|fold|merge|collapse)_?(kernel|conv|branch|bn|norm|weight|repvgg)"
)
_NOT_FOLDING = re.compile(r"fuse_model|fuse_modules|^convert_sync|split|unfold|^forward|^__")


@functools.cache
def folds(cls: Any) -> bool:
    """Whether a method of a class folds its convolutions, judged by its name or by its code."""
    # A method that the forward itself calls (``self.merge(shortcut, branch)``) computes maps.
    called = getattr(getattr(cls.forward, "__code__", None), "co_names", ())
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith("torch.nn."):
            continue
        for name, member in vars(base).items():
            function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            if not inspect.isfunction(function) or _NOT_FOLDING.search(name):
                continue
            named = _NAME.search(name.lower()) and name not in called
            if named or _folds_kernels(function):
                return True
    return False


def _folds_kernels(function: object) -> bool:
    """Whether a function computes a kernel from the weights of layers that it then replaces."""
    try:
        text = inspect.getsource(function)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return False
    folds_norm = "running_var" in text and ".weight" in text
    replaces = re.search(r"\bdel self\.|__delattr__|delattr\(|\.weight(\.data)?\s*=|copy_\(", text)
    makes = re.search(r"Conv\dd\(|Parameter\(", text)
    return folds_norm or bool(".weight" in text and replaces and makes)
