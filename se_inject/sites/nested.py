"""Finds additions that are part of another one's branch, or of a cell that joins several sums."""

from torch import fx

from se_inject.sites.additions import joins_after
from se_inject.sites.flow import Flow
from se_inject.sites.residual import Residual


def is_inner(
    node: fx.Node,
    residual: Residual,
    outer_node: fx.Node,
    outer: Residual,
) -> bool:
    """Whether an addition is a part of another's branch rather than a residual unit in it.

    Units in a row under a long skip (a network in one forward) stay sites of their own, because the
    whole branch passes through each of them. Res2Net's inner additions see only a part of the
    channels. In ``a + b + x`` both sums have the same split point, and no convolution follows the
    first one.
    """
    flow = outer.flow
    if outer_node is node or not flow.reaches(node, outer.branch):
        return False
    if outer.split_point is not None and flow.reaches(node, outer.split_point):
        return False  # It comes before the outer branch begins.
    if not flow.dominates(node, outer.branch):
        return True
    after = flow.between(node, outer.branch)
    return residual.split_point is outer.split_point and not any(
        op.is_convolution for op in flow.ops(after)
    )


def is_sibling(flow: Flow, node: fx.Node, residual: Residual, other: fx.Node) -> bool:
    """Whether a cell computes ``other`` beside ``node`` from the same split point and joins both.

    NASNet's cells concatenate five such sums, and none of them is the trunk of the network.
    """
    if flow.reaches(node, other) or flow.reaches(other, node):
        return False
    split_point = residual.split_point
    from_split_point = split_point is None or flow.reaches(split_point, other)
    return from_split_point and bool(joins_after(flow, node) & joins_after(flow, other))
