"""History -> units, and their nodes in the block graphs."""

from collections.abc import Mapping, Set

from torch import fx, nn

from se_inject.graph.facts import NodeFacts, TracedForward
from se_inject.graph.recording.history import History, ModuleCall
from se_inject.layers.layout import Layout
from se_inject.reasons import Reason
from se_inject.sites.chains import find_chains
from se_inject.sites.flow import Flow
from se_inject.sites.joins import find_joins
from se_inject.sites.memory import separable
from se_inject.sites.scaled import UnitSite
from se_inject.sites.unit_flow import UnitFlow, layout_of
from se_inject.sites.unit_point import Found, Unit


def find_units(history: History, modules: Mapping[str, nn.Module], residual: Set[str]) -> Found:
    """The units of a recorded forward, in the order in which they end.

    Args:
        history: the history of a network without SE blocks of se_inject.
        modules: all modules of the network by name.
        residual: the blocks that have residual additions, which are units already.
    """
    flow = UnitFlow(history, modules)
    found = find_joins(flow, residual)
    gated = any(reason == Reason.UNIT_GATED for _, reason, _ in found.skipped)
    if not residual and not found.units and not gated:
        chains = find_chains(flow)
        chains.skipped = found.skipped | chains.skipped
        found = chains
    found.units.sort(key=lambda unit: unit.end)
    return found


def unit_site(
    forward: TracedForward, history: History, call: ModuleCall, unit: Unit
) -> UnitSite | Reason:
    """The end of a unit as a node of a block's graph.

    The graph runs the same operations in the same order as the recorded call, which
    :mod:`se_inject.graph.trace` checks. The node is therefore found by counting the operations.
    """
    facts = forward.calls[0]
    node = _node_of(facts, unit.end - call.start, call.end - call.start)
    if isinstance(node, Reason):
        return node
    own = facts[node]
    seen = layout_of(history.events[unit.end])
    dim = own.channel_dim
    if dim is None and seen is not None:
        dim = seen.channel_dim
    if own.shape is None or own.dtype is None or not own.dtype.is_floating_point:
        return Reason.NO_MAP
    if dim is None or not (layout := Layout(len(own.shape), dim)).is_map:
        return Reason.CHANNELS_UNKNOWN
    readers = tuple(node.users)
    # A plain activation in place is safe, because the chain is straight and nobody else reads its
    # input.
    if not unit.leaf and not separable(Flow(forward.graph, facts), node, readers):
        return Reason.SHARED_IN_PLACE
    shapes = tuple(shape for each in forward.calls if (shape := each[node].shape) is not None)
    if len({shape[dim] for shape in shapes}) > 1:
        return Reason.WIDTHS
    return UnitSite(node, readers, own.shape[dim], layout, own.dtype, shapes)


def _node_of(facts: Mapping[fx.Node, NodeFacts], number: int, total: int) -> fx.Node | Reason:
    """The node in which operation ``number`` of ``total`` ran, if only scales follow in it."""
    done = 0
    found: fx.Node | Reason = Reason.HIDDEN
    for node, own in facts.items():
        if done <= number < done + len(own.ops):
            rest = own.ops[number - done + 1 :]
            inside = any(not (op.is_dropout or op.scales) for op in rest)
            found = Reason.UNIT_INSIDE_CHILD if inside else node
        done += len(own.ops)
    return found if done == total else Reason.UNTRACED
