"""Block graph -> residual sites; reads only.

A residual site is an addition ``out = F(x) + shortcut(x)`` of two maps of one shape, where the
branch F passes at least one convolution and the shortcut is the identity or a short projection.
The SE block goes on the branch, after its last convolution and norm and before stochastic depth,
layer scale and skip gain, or where another placement of the paper has it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from se_inject.graph.ops import Op
from se_inject.layers.layout import KINDS
from se_inject.reasons import Reason
from se_inject.sites.flow import Flow


@dataclass(frozen=True)
class Residual:
    """An addition that has the shape of a residual one."""

    split_point: fx.Node | None
    branch: fx.Node
    shortcut: fx.Node


def shape_verdict(flow: Flow, module: nn.Module, node: fx.Node) -> Residual | Reason:
    addition = flow.addition(node)
    assert addition is not None
    a, b, op = addition
    if op.alpha != 1:
        return Reason.SCALED
    if len(op.shape) not in KINDS:
        return Reason.NO_MAP
    if a not in flow.dominator or b not in flow.dominator:
        # An operand was kept on an attribute since another module ran.
        return Reason.TOKENS if _adds_tokens(flow, node, ()) else Reason.FUSION
    split_point = flow.meet(a, b)
    if _adds_tokens(flow, node, [*flow.between(split_point, a), *flow.between(split_point, b)]):
        return Reason.TOKENS
    if _collapses(module, flow.ops([*flow.between(split_point, a), *flow.between(split_point, b)])):
        return Reason.REPARAMETERISABLE
    depth = {n: flow.depth(split_point, n) for n in (a, b)}
    branch, shortcut = (a, b) if depth[a] >= depth[b] else (b, a)
    if not any(op.is_convolution for op in flow.ops(flow.between(split_point, branch))):
        return Reason.NO_CONVOLUTION
    if depth[branch] == depth[shortcut] or not _is_shortcut(flow, split_point, shortcut):
        return Reason.FUSION
    if flow.keeps_input(split_point, branch):
        return Reason.FUSION  # a part of the sum is the shortcut: the SE block would scale it
    return Residual(split_point, branch, shortcut)


def _adds_tokens(flow: Flow, node: fx.Node, paths: Sequence[fx.Node]) -> bool:
    """Whether the sum is [N, L, C] of a transformer rather than [N, C, L] of Conv1d layers."""
    kind = KINDS[len(flow.facts[node].shape or ())]
    if kind.channels_last:
        return False
    channel_dim = flow.facts[node].channel_dim
    if channel_dim is not None:
        return channel_dim != 1
    return not any(op.name in kind.functions for op in flow.ops(paths))


def _is_shortcut(flow: Flow, split_point: fx.Node | None, end: fx.Node) -> bool:
    """The identity, or a straight path of at most two convolutions; pooling and norm allowed."""
    path = flow.between(split_point, end)
    ops = list(flow.ops(path))
    straight = all(len(flow.inputs[n]) <= 1 for n in path) and not any(op.joins for op in ops)
    short = sum(op.is_convolution for op in ops) <= 2
    # A shortcut that the caller computed (DLA) comes as it is; two inputs that are both
    # convolved or resampled before they are added are fused (feature pyramids, NASNet's cells).
    given = split_point is not None or not ops
    return straight and short and given


# Of timm, of the RepVGG and MobileOne repositories, and of Ultralytics.
_COLLAPSING_METHODS: tuple[str, ...] = ("reparameterize", "fuse", "switch_to_deploy", "fuse_convs")
_COLLAPSING_METHODS += ("get_equivalent_kernel_bias", "repvgg_convert", "fuse_repvgg_block")


def _collapses(module: nn.Module, ops: Iterator[Op]) -> bool:
    """Whether the module can fold itself into one convolution, and both paths are linear."""
    foldable = any(callable(getattr(module, name, None)) for name in _COLLAPSING_METHODS)
    return foldable and all(op.is_linear_in_map for op in ops)


def is_inner(
    flow: Flow,
    node: fx.Node,
    residual: Residual,
    outer_node: fx.Node,
    outer: Residual,
) -> bool:
    """Whether an addition is a part of another's branch rather than a residual unit in it.

    Units in a row under a long skip (a network in one forward) stay sites of their own: the
    whole branch passes each of them. Res2Net's inner additions see a part of the channels only,
    and in ``a + b + x`` the first sum has the split_point of the second and nothing follows it.
    """
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
    """Whether the cell computes ``other`` beside ``node`` from the same split_point and joins both.

    NASNet's cells concatenate five such sums: none of them is the trunk of the network.
    """
    if flow.reaches(node, other) or flow.reaches(other, node):
        return False
    split_point = residual.split_point
    from_split_point = split_point is None or flow.reaches(split_point, other)
    return from_split_point and bool(flow.joins_after(node) & flow.joins_after(other))
