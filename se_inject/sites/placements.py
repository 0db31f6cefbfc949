"""Where the SE block goes at a residual addition, for each placement of the paper."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from se_inject.graph.operations.ops import ADD, Op
from se_inject.reasons import Reason
from se_inject.sites.additions import addition, reader_of
from se_inject.sites.flow import Flow
from se_inject.sites.memory import is_in_place, read_again, separable
from se_inject.sites.residual import Residual

Placement = Literal["standard", "pre", "post", "identity", "3x3"]


@dataclass(frozen=True)
class Point:
    """The map that the SE block reads, and the nodes that read its output in place of the map."""

    source: fx.Node
    readers: tuple[fx.Node, ...]
    alike: tuple[fx.Node, ...] = ()  # maps whose dims mean the same as those of the source
    fused: bool = False


def _before_addition(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """standard: on the branch, before stochastic depth, dropout, layer scale and gains."""
    reader, *chain = _tail(flow, node, residual)
    branch = chain[0]
    # ``x += F(x)`` changes the caller's x. Only the addition itself can go on doing so.
    mutates_shortcut = is_in_place(node) and node.args[0] is residual.shortcut
    for step in {node, reader}:
        # After ``out += x``, a node that reads ``out`` reads the sum. With SE it would not.
        if is_in_place(step) and step.args[0] in chain and read_again(flow, step):
            return Reason.SHARED_IN_PLACE
    # Nothing between branch and addition moves a dim, so the shortcut's dims mean the same.
    fused = reader is node and not mutates_shortcut and _is_plain(flow, node)
    return Point(branch, (reader,), (residual.shortcut,), fused)


def _tail(flow: Flow, node: fx.Node, residual: Residual) -> list[fx.Node]:
    """The node that reads the branch map, the map itself, and the nodes that drop or scale it."""
    reader, chain = reader_of(flow, node), [residual.branch]
    while _is_tail(flow, chain[0]):
        reader = chain[0]
        source = flow.inputs[reader][0]
        assert isinstance(source, fx.Node)
        chain = [source, *chain]
    return [reader, *chain]


def _on_branch_input(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """pre: on the map that the branch reads. The shortcut reads the map as it was."""
    path = flow.between(residual.split_point, residual.branch)
    source = residual.split_point
    if not isinstance(source, fx.Node):  # the shortcut is another argument of the block
        nodes = [n for n in path if isinstance(n, fx.Node)]
        entries = [n for n in nodes if not any(i in nodes for i in flow.inputs[n])]
        if len(entries) != 1:
            return Reason.SEVERAL_INPUTS
        source = entries[0]
    readers = _readers(flow, source, residual.branch)
    if not readers:
        return Reason.INSIDE_CHILD
    alike = (residual.branch,) if source is residual.shortcut else ()
    return _separate(flow, Point(source, tuple(readers), alike))


def _after_addition(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """post: after the addition and, if an activation follows, after that too."""
    source = flow.next_step(node, _is_activation) or node
    return _separate(flow, Point(source, tuple(source.users), (residual.branch, residual.shortcut)))


def _on_shortcut(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """identity: on the operand of the addition that is not the branch."""
    return _separate(flow, Point(residual.shortcut, (reader_of(flow, node),), (residual.branch,)))


def _after_spatial_convolution(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """3x3: after the branch's last spatial convolution and its norm.

    If the convolution is depthwise, the SE block goes after the activation too, as in MobileNetV3
    and EfficientNet.
    """
    path = flow.between(residual.split_point, residual.branch)
    spatial = [n for n in path if any(op.is_spatial_convolution for op in flow.passed[n])]
    if not spatial:
        return Reason.NO_SPATIAL
    source = spatial[-1]
    if not isinstance(source, fx.Node):
        return Reason.INSIDE_CHILD
    if not flow.dominates(source, residual.branch):
        return Reason.SIDE_BY_SIDE
    ops = flow.passed[source]
    last = max(i for i, op in enumerate(ops) if op.is_spatial_convolution)
    if any(op.adds_depth for op in ops[last + 1 :]):
        return Reason.CONVOLUTION_INSIDE
    if not _is_norm(ops[last + 1 :]):
        source = flow.next_step(source, _is_norm, permuted=True) or source
    if ops[last].is_depthwise and not any(op.is_activation for op in flow.passed[source]):
        source = flow.next_step(source, _is_activation) or source
    _, end, *_ = _tail(flow, node, residual)
    if source is end or source not in flow.between(residual.split_point, end):
        return _before_addition(flow, node, residual)
    return _separate(flow, Point(source, tuple(source.users)))


@dataclass(frozen=True)
class PlacementRule:
    """A placement in words, and the function that finds its point at a residual addition."""

    text: str
    point: Callable[[Flow, fx.Node, Residual], Point | Reason]


PLACEMENTS: dict[Placement, PlacementRule] = {
    "standard": PlacementRule("on the branch before the addition", _before_addition),
    "pre": PlacementRule("on what the branch reads", _on_branch_input),
    "post": PlacementRule("behind the addition and its ReLU", _after_addition),
    "identity": PlacementRule("on the shortcut", _on_shortcut),
    "3x3": PlacementRule(
        "behind the branch's last spatial convolution and its norm", _after_spatial_convolution
    ),
}


def _separate(flow: Flow, point: Point) -> Point | Reason:
    """The point, unless somebody would notice that the SE block makes a copy of the map."""
    if not point.readers or not separable(flow, point.source, point.readers):
        return Reason.SHARED_IN_PLACE
    return point


def _is_norm(ops: Sequence[Op]) -> bool:
    """Whether these begin with a norm, perhaps with an activation after it.

    An activation with a gain only ends like a norm.
    """
    first = next((op for op in ops if not op.is_permutation), None)
    plain = not any(op.adds_depth or op.joins for op in ops)
    return plain and first is not None and first.is_affine


def _is_activation(ops: Sequence[Op]) -> bool:
    """Whether these are an activation alone, perhaps with products (``x * sigmoid(x)``, a gain)."""
    named = any(op.is_activation for op in ops)
    return named and all(op.is_activation or op.is_product for op in ops)


def _is_tail(flow: Flow, node: fx.Node) -> bool:
    """Whether a node only drops or scales its one input, and so belongs after the SE block."""
    if node.op == "placeholder" or len(flow.inputs[node]) != 1:
        return False
    (source,) = flow.inputs[node]
    # The SE block has to read a node that this one reads. The inside of a child is out of reach.
    if not isinstance(source, fx.Node) or source not in node.all_input_nodes:
        return False
    facts = flow.facts[node]
    same = facts.shape is not None and facts.shape == flow.facts[source].shape
    return same and all(op.is_dropout or op.scales for op in flow.passed[node])


def _is_plain(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a plain addition, which the SE block can take over."""
    added = addition(flow, node)
    return node.op != "call_module" and added is not None and added[2].name in ADD


def _readers(flow: Flow, source: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes that read a node on the way to ``end``, including lists of maps and the like."""
    before = {end}
    for node in sorted(flow.facts, key=flow.position, reverse=True):
        if before.intersection(node.users):
            before.add(node)
    return [user for user in source.users if user in before]
