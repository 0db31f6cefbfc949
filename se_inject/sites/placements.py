"""Where at a residual addition the SE block goes, for each placement of the paper."""

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
    """The map that the SE block reads, and what reads its output in place of the map."""

    source: fx.Node
    readers: tuple[fx.Node, ...]
    alike: tuple[fx.Node, ...] = ()  # maps whose dims are those of the source
    fused: bool = False


def _before_addition(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """standard: on the branch, before stochastic depth, dropout, layer scale and gains."""
    reader, *chain = _tail(flow, node, residual)
    branch = chain[0]
    # ``x += F(x)`` changes the caller's x; only the addition itself can go on doing so.
    mutates_shortcut = is_in_place(node) and node.args[0] is residual.shortcut
    for step in {node, reader}:
        # Who reads ``out`` after ``out += x`` reads the sum; after the SE block it would not.
        if is_in_place(step) and step.args[0] in chain and read_again(flow, step):
            return Reason.SHARED_IN_PLACE
    # What stands between branch and addition moves no dim.
    fused = reader is node and not mutates_shortcut and _is_plain(flow, node)
    return Point(branch, (reader,), (residual.shortcut,), fused)


def _tail(flow: Flow, node: fx.Node, residual: Residual) -> list[fx.Node]:
    """What reads the branch map, the branch map itself, and what only drops or scales it."""
    reader, chain = reader_of(flow, node), [residual.branch]
    while _is_tail(flow, chain[0]):
        reader = chain[0]
        source = flow.inputs[reader][0]
        assert isinstance(source, fx.Node)
        chain = [source, *chain]
    return [reader, *chain]


def _on_branch_input(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """pre: on what the branch reads; the shortcut reads the map as it was."""
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
    """post: behind the addition and, where one follows, its activation."""
    source = flow.next_step(node, _is_activation) or node
    return _separate(flow, Point(source, tuple(source.users), (residual.branch, residual.shortcut)))


def _on_shortcut(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """identity: on the operand of the addition that is not the branch."""
    return _separate(flow, Point(residual.shortcut, (reader_of(flow, node),), (residual.branch,)))


def _after_spatial_convolution(flow: Flow, node: fx.Node, residual: Residual) -> Point | Reason:
    """3x3: behind the branch's last spatial convolution and its norm.

    Behind the activation too, where the convolution is depthwise: there MobileNetV3 and
    EfficientNet have it.
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
    """The point, unless the copy that the SE block makes would be seen."""
    if not point.readers or not separable(flow, point.source, point.readers):
        return Reason.SHARED_IN_PLACE
    return point


def _is_norm(ops: Sequence[Op]) -> bool:
    """Begins as a norm (an activation with a gain ends as one), perhaps with an activation."""
    first = next((op for op in ops if not op.is_permutation), None)
    plain = not any(op.adds_depth or op.joins for op in ops)
    return plain and first is not None and first.is_affine


def _is_activation(ops: Sequence[Op]) -> bool:
    """Alone, or made of products (``x * sigmoid(x)``, a gain)."""
    named = any(op.is_activation for op in ops)
    return named and all(op.is_activation or op.is_product for op in ops)


def _is_tail(flow: Flow, node: fx.Node) -> bool:
    """Whether a node only drops or scales its one input, and so belongs behind the SE block."""
    if node.op == "placeholder" or len(flow.inputs[node]) != 1:
        return False
    (source,) = flow.inputs[node]
    # The SE block reads a node that this one reads; what a child did before is out of reach.
    if not isinstance(source, fx.Node) or source not in node.all_input_nodes:
        return False
    facts = flow.facts[node]
    same = facts.shape is not None and facts.shape == flow.facts[source].shape
    return same and all(op.is_dropout or op.scales for op in flow.passed[node])


def _is_plain(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is an addition in so many words, which the SE block can take over."""
    added = addition(flow, node)
    return node.op != "call_module" and added is not None and added[2].name in ADD


def _readers(flow: Flow, source: fx.Node, end: fx.Node) -> list[fx.Node]:
    """What reads a node on the way to ``end``, lists of maps and the like among it."""
    before = {end}
    for node in sorted(flow.facts, key=flow.position, reverse=True):
        if before.intersection(node.users):
            before.add(node)
    return [user for user in source.users if user in before]
