"""Finds sums that bring two paths together, as in a decoder or in a stage with two paths (CSP)."""

from torch import fx

from se_inject.graph.operations.ops import CHANNELS_FIRST_NORM
from se_inject.graph.operations.value import Value
from se_inject.sites.flow import Flow, Step


def is_decoded(flow: Flow, split_point: Step | None, a: fx.Node, b: fx.Node) -> bool:
    """Whether only one operand comes from a smaller map (a pyramid, an hourglass, a U-Net)."""
    return flow.enlarged(split_point, a) != flow.enlarged(split_point, b)


def is_second_path(
    flow: Flow, split_point: Step | None, branch: fx.Node, shortcut: fx.Node
) -> bool:
    """Whether a projected operand is a path of its own, as in the sums of CSP stages.

    The projection of a shortcut has no activation after it. The branch beside it does not consist
    of several residual units on a projection of its own.
    """
    ops = list(flow.ops(flow.between(split_point, shortcut)))
    last = max((i for i, op in enumerate(ops) if op.is_convolution), default=None)
    if last is None:
        return False
    return any(op.is_activation for op in ops[last + 1 :]) or _is_stage(flow, branch)


def _is_stage(flow: Flow, branch: fx.Node) -> bool:
    """Whether a path is a 1x1 convolution and then two or more units that add an identity.

    A row of units on the split point itself, as in RoR's stages, is a branch.
    """
    value, units = flow.facts[branch].value, 0
    while value is not None and (op := value.op) is not None:
        if op.is_activation or op.name in CHANNELS_FIRST_NORM:
            value = value.inputs[0]
            continue
        if not op.adds_maps or len(value.inputs) != 2:
            return units > 1 and op.is_convolution and not op.is_spatial_convolution
        a, b = value.inputs
        base, longer = (b, a) if _comes_from(a, b) else (a, b)
        if not _comes_from(longer, base):
            return False
        value, units = base, units + (op.alpha == 1 and _convolves(longer, base))
    return False


def _comes_from(value: Value, source: Value) -> bool:
    return source in _past(value, None)


def _convolves(value: Value, source: Value) -> bool:
    """Whether there is a convolution on the way from one value to another."""
    steps = _past(value, source)
    return any(step.op is not None and step.op.is_convolution for step in steps)


def _past(value: Value, end: Value | None) -> set[Value]:
    """The values that a value was computed from, itself included, back to ``end`` (left out)."""
    seen: set[Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current not in seen and current is not end:
            seen.add(current)
            stack += current.inputs
    return seen
