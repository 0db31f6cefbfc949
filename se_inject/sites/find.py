"""Block graph -> residual sites, and every other addition with its reason. It only reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from se_inject.graph.facts import NodeFacts
from se_inject.graph.operations.value import Value
from se_inject.layers.layout import KINDS, Layout
from se_inject.reasons import Reason
from se_inject.sites.additions import addition, operands
from se_inject.sites.flow import Flow, Past
from se_inject.sites.memory import is_in_place
from se_inject.sites.nested import is_inner, is_sibling
from se_inject.sites.placements import PLACEMENTS, Placement, Point
from se_inject.sites.residual import Residual, shape_verdict
from se_inject.sites.scaled import ResidualSite


@dataclass(frozen=True)
class Rejection:
    """An addition of two maps that is not a site."""

    addition: fx.Node
    reason: Reason


@dataclass(frozen=True)
class Sites:
    """The residual sites of one block graph, and every other addition of two maps."""

    sites: list[ResidualSite]
    rejected: list[Rejection]
    # Whether it would help to know what the inputs of the block went through before the call. That
    # is so if the operands of an addition come from different inputs, or an input scales a branch.
    asks_past: bool


def find_sites(
    graph: fx.Graph,
    calls: Sequence[Mapping[fx.Node, NodeFacts]],
    module: nn.Module,
    placement: Placement = "standard",
    adders: frozenset[str] = frozenset(),
    pasts: Sequence[Past] | None = None,
) -> Sites:
    """The residual sites of one block graph, and every other addition of two maps.

    Args:
        graph: the block's own forward, in which every child is a leaf.
        calls: what each node computed, with one mapping for each recorded call.
        module: the block. It is only asked whether it has a method that folds its convolutions.
        placement: where at a residual addition the SE block goes. It does not change which
            additions are residual.
        adders: the children that only add their inputs. Their calls are additions.
        pasts: where the tensors that the block was given come from, with one sequence for each
            call. They are needed only if ``Sites.asks_past`` is true without them.
    """
    flow = Flow(graph, calls[0], adders=adders)
    additions = [n for n in graph.nodes if addition(flow, n) is not None]
    split_by_caller = [n for n in additions if _is_split_by_caller(flow, n)]
    flows = dict.fromkeys(additions, flow)
    shapes = {n: shape_verdict(flow, module, n) for n in additions}
    for past in (pasts or ()) if split_by_caller else ():
        whole = Flow(graph, calls[0], past, adders=adders)
        for node in split_by_caller:
            judged = shape_verdict(whole, module, node)
            first = flows[node] is flow
            shapes[node] = judged if first else _agreed(shapes[node], judged)
            flows[node] = whole
    for node in additions:
        # In ``x + a(x) + b(x)`` neither addition has the whole branch on one side.
        for part in operands(flow, node):
            inner = shapes.get(part)
            same_split_point = (
                isinstance(inner, Residual) and inner.split_point is inner.flow.dominator[node]
            )
            if same_split_point and shapes[node] is Reason.FUSION:
                shapes[part] = Reason.FUSION
    residuals = {n: r for n in additions if isinstance(r := shapes[n], Residual)}
    sites: list[ResidualSite] = []
    rejected: list[Rejection] = []
    for node in additions:
        shape = shapes[node]
        verdict = (
            _site(flows[node], calls, node, additions, residuals, placement)
            if isinstance(shape, Residual)
            else shape
        )
        if isinstance(verdict, ResidualSite):
            sites.append(verdict)
        else:
            rejected.append(Rejection(node, verdict))
    for node in graph.nodes:
        own = node.op in ("call_function", "call_method") or str(node.target) in adders
        if node.op != "output" and own and addition(flow, node) is None:
            ops = calls[0][node].ops
            hidden = sum(op.adds_maps for op in ops)
            rejected += [Rejection(node, Reason.HIDDEN)] * hidden
            rejected += [Rejection(node, Reason.BLENDED)] * sum(op.blends for op in ops)
    asks = split_by_caller or any(
        _is_scaled_by_input(flow, residuals[site.addition].branch) for site in sites
    )
    return Sites(sites, rejected, bool(asks) and pasts is None)


def _is_split_by_caller(flow: Flow, node: fx.Node) -> bool:
    a, b = operands(flow, node)
    both = a in flow.roots and b in flow.roots
    return both and flow.meet(a, b) is None and not flow.roots[a] & flow.roots[b]


def _agreed(one: Residual | Reason, other: Residual | Reason) -> Residual | Reason:
    """The verdict on an addition that holds in two calls of its block."""
    if isinstance(one, Reason):
        return one
    if isinstance(other, Reason):
        return other
    return one if one.branch is other.branch else Reason.FUSION


def _site(
    flow: Flow,
    calls: Sequence[Mapping[fx.Node, NodeFacts]],
    node: fx.Node,
    additions: Sequence[fx.Node],
    residuals: Mapping[fx.Node, Residual],
    placement: Placement,
) -> ResidualSite | Reason:
    residual = residuals[node]
    path = residual.flow.between(residual.split_point, residual.branch)
    if any(is_inner(node, residual, outer, residuals[outer]) for outer in residuals):
        return Reason.INNER
    if any(is_sibling(flow, node, residual, sum_node) for sum_node in additions):
        return Reason.FUSION
    if any(op.gates for op in residual.flow.ops(path)):
        return Reason.GATED
    point = PLACEMENTS[placement].point(residual.flow, node, residual)
    if isinstance(point, Reason):
        return point
    facts = flow.facts[point.source]
    if facts.shape is None or facts.dtype is None or not facts.dtype.is_floating_point:
        return Reason.NO_MAP
    if len(facts.shape) not in KINDS:
        return Reason.NO_MAP
    channel_dim = _channel_dim(flow, point)
    if channel_dim is None:
        return Reason.CHANNELS_UNKNOWN
    layout = Layout(len(facts.shape), channel_dim)
    if not layout.is_map:
        return Reason.TOKENS if layout.channels_last else Reason.CHANNELS_UNKNOWN
    shapes = tuple(shape for call in calls if (shape := call[point.source].shape) is not None)
    if len({shape[channel_dim] for shape in shapes}) > 1:
        return Reason.WIDTHS
    return ResidualSite(
        addition=node,
        source=point.source,
        readers=point.readers,
        shortcut=residual.shortcut,
        fused=point.fused,
        shortcut_first=operands(flow, node)[0] is residual.shortcut,
        in_place=is_in_place(node),
        channels=facts.shape[channel_dim],
        layout=layout,
        dtype=facts.dtype,
        shapes=shapes,
    )


def _channel_dim(flow: Flow, point: Point) -> int | None:
    """The channel dim of the source, known there, from a map like it, or from its reader."""
    for node in (point.source, *point.alike):
        if (known := flow.facts[node].channel_dim) is not None:
            return known
    for reader in point.source.users:
        ops = flow.facts[reader].ops if reader in flow.facts else ()
        if ops and ops[0].reads_channels_first and reader.all_input_nodes == [point.source]:
            return 1
    return None


def _is_scaled_by_input(flow: Flow, branch: fx.Node) -> bool:
    """Whether a map is multiplied by what comes from another input of the block, perhaps a gate."""
    value = flow.facts[branch].value
    inputs = {v.number for facts in flow.facts.values() if (v := facts.value)} - {None}
    if value is None or len(inputs) < 2:
        return False
    origins: dict[Value, frozenset[int | None]] = {}
    stack = [value]
    while stack:  # depth first: a value leaves the stack when its inputs are known
        current = stack[-1]
        if waiting := [v for v in current.inputs if v not in origins]:
            stack += waiting
            continue
        stack.pop()
        if current.number is not None:
            origins[current] = frozenset([current.number])
            continue
        parts = [origins[v] for v in current.inputs]
        origins[current] = frozenset[int | None]().union(*parts)
        op = current.op
        scaled = op is not None and op.is_product and not op.scales and len(parts) == 2
        if scaled and not parts[0] & parts[1]:
            return True
    return False
