"""The rule that tells a residual addition from other additions. It only reads.

A residual addition is ``out = F(x) + shortcut(x)`` with two maps of one shape. The branch F has at
least one convolution, and the shortcut is the identity or a short projection. The SE block goes on
the branch, after its last convolution and norm and before stochastic depth, layer scale and skip
gain. The other placements of the paper put it elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from se_inject.graph.operations.ops import Op
from se_inject.graph.operations.value import Value
from se_inject.layers.layout import KINDS
from se_inject.reasons import Reason
from se_inject.sites.additions import addition
from se_inject.sites.collapse import collapses
from se_inject.sites.flow import Flow, Step
from se_inject.sites.fusion import is_decoded, is_second_path


@dataclass(frozen=True)
class Residual:
    """An addition that has the shape of a residual one."""

    split_point: Step | None
    branch: fx.Node
    shortcut: fx.Node
    flow: Flow  # the part of the block's flow that both operands come from


def shape_verdict(flow: Flow, module: nn.Module, node: fx.Node) -> Residual | Reason:
    added = addition(flow, node)
    assert added is not None
    a, b, op = added
    if op.alpha != 1:
        return Reason.SCALED
    if len(op.shape) not in KINDS:
        return Reason.NO_MAP
    if a not in flow.dominator or b not in flow.dominator:
        # An operand was stored in an attribute when another module ran.
        return Reason.TOKENS if _adds_tokens(flow, node, ()) else Reason.FUSION
    verdicts = [_verdict_in(part, module, node, a, b) for part in _common_flows(flow, a, b)]
    return next((v for v in verdicts if isinstance(v, Residual)), verdicts[0])


def _common_flows(flow: Flow, a: fx.Node, b: fx.Node) -> list[Flow]:
    """The parts of the flow in which both operands come from one step.

    A second input (a time, a mask, a style) does not hide the one that both come from. If they come
    from different inputs, the caller has split the path, or there is no common step at all.
    """
    if flow.meet(a, b) is not None:
        return [flow]
    common = flow.roots[a] & flow.roots[b]
    if common:
        return [flow.rooted(root) for root in sorted(common, key=flow.order.__getitem__)]
    return [flow]


def _verdict_in(
    flow: Flow, module: nn.Module, node: fx.Node, a: fx.Node, b: fx.Node
) -> Residual | Reason:
    split_point = flow.meet(a, b)
    paths = [flow.between(split_point, a), flow.between(split_point, b)]
    if _adds_tokens(flow, node, [*paths[0], *paths[1]]):
        return Reason.TOKENS
    if collapses(module, flow, split_point, node):
        return Reason.REPARAMETERISABLE
    branch, shortcut = _by_depth(flow, split_point, a, b)
    if not any(op.is_convolution for op in flow.ops(flow.between(split_point, branch))):
        return Reason.NO_CONVOLUTION
    if _is_image(flow, split_point, node, branch):
        return Reason.IMAGE
    if is_decoded(flow, split_point, a, b) or is_second_path(flow, split_point, branch, shortcut):
        return Reason.FUSION
    if not _is_deeper(flow, split_point, branch, shortcut):
        return Reason.FUSION
    if not _is_shortcut(flow, split_point, shortcut):
        return Reason.FUSION
    if flow.keeps_input(split_point, branch):
        return Reason.FUSION  # the branch has the shortcut in it, and the SE block would scale it
    return Residual(split_point, branch, shortcut, flow)


def _is_image(flow: Flow, split_point: Step | None, node: fx.Node, branch: fx.Node) -> bool:
    """Whether the sum is an image, as in super-resolution with its global residual.

    An image has at most three channels, while the branch has more on the way. There are no features
    to weigh.
    """
    shape, channel_dim = flow.facts[node].shape or (), flow.facts[node].channel_dim
    if channel_dim != 1 or shape[1] > 3:
        return False
    ops = flow.ops(flow.between(split_point, branch))
    return any(op.is_convolution and op.shape[1] > 3 for op in ops)


def _by_depth(
    flow: Flow, split_point: Step | None, a: fx.Node, b: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """The operand that may be the branch, and the one that may be the shortcut."""
    depth = {n: flow.depth(split_point, n) for n in (a, b)}
    if depth[a] == depth[b] and _is_projection(flow, split_point, a, b):
        return b, a
    return (a, b) if depth[a] >= depth[b] else (b, a)


def _is_deeper(flow: Flow, split_point: Step | None, branch: fx.Node, shortcut: fx.Node) -> bool:
    """Whether one operand is a branch beside the other.

    A spatial convolution beside a 1x1 projection counts as a branch too, because its siblings
    without a projection are residual blocks.
    """
    depths = [flow.depth(split_point, n) for n in (branch, shortcut)]
    if depths[0] != depths[1]:
        return True
    convolutions = [op for op in flow.ops(flow.between(split_point, branch)) if op.is_convolution]
    return (
        depths[0] == len(convolutions) == 1
        and convolutions[0].is_spatial_convolution
        and _is_projection(flow, split_point, shortcut, branch)
    )


def _is_projection(flow: Flow, split_point: Step | None, end: fx.Node, branch: fx.Node) -> bool:
    """Whether the path is one 1x1 convolution with nothing non-linear after it.

    If the maps get smaller and the branch has an activation, the convolution may also see more than
    one position (as in MONAI's strided units).
    """
    ops = list(flow.ops(flow.between(split_point, end)))
    convolutions = [i for i, op in enumerate(ops) if op.is_convolution]
    if len(convolutions) != 1 or _bends(ops[convolutions[0] :]):
        return False
    if not ops[convolutions[0]].is_spatial_convolution:
        return True
    before = flow.facts[split_point].shape if isinstance(split_point, fx.Node) else None
    after = flow.facts[end].shape
    smaller = before is not None and after is not None and before[2:] != after[2:]
    return smaller and _bends(list(flow.ops(flow.between(split_point, branch))))


def _bends(ops: Sequence[Op]) -> bool:
    """Whether any of these operations is non-linear."""
    return any(op.is_activation or op.is_product for op in ops)


def _adds_tokens(flow: Flow, node: fx.Node, paths: Sequence[Step]) -> bool:
    """Whether the sum is the [N, L, C] of a transformer and not the [N, C, L] of Conv1d layers."""
    kind = KINDS[len(flow.facts[node].shape or ())]
    if kind.channels_last:
        return False
    channel_dim = flow.facts[node].channel_dim
    if channel_dim is not None:
        return channel_dim != 1
    return not any(op.name in kind.functions for op in flow.ops(paths))


def _is_shortcut(flow: Flow, split_point: Step | None, end: fx.Node) -> bool:
    """Whether a path is the identity, or straight with at most two convolutions.

    Pooling and norms are allowed on it.
    """
    path = flow.between(split_point, end)
    ops = list(flow.ops(path))
    straight = all(_is_straight(flow, split_point, step) for step in path)
    short = sum(op.is_convolution for op in ops) <= 2
    # A shortcut that the caller computed (as in DLA) is added as it is. If two inputs are both
    # convolved or resampled before the addition, it is a fusion (feature pyramids, NASNet's cells).
    given = split_point is not None or not ops
    return straight and short and given


def _is_straight(flow: Flow, split_point: Step | None, step: Step) -> bool:
    """Whether a step brings no paths together.

    A concatenation with zeros, or with another form of the map itself, only adds channels. It is
    not a join, because nothing on the paths to it has weights.
    """
    ops = flow.passed[step]
    joins = [op for op in ops if op.joins]
    if not joins and (isinstance(step, Value) or len(flow.inputs[step]) <= 1):
        return True
    pads = all(op.pads for op in joins) and bool(joins)
    return pads and not any(
        op.adds_depth or op.adds_maps for op in flow.ops(flow.between(split_point, step))
    )
