"""Units that end where maps are concatenated: Inception modules, dense layers, split blocks.

Within one call of a module, a map that passed a convolution in it is *new*, and what the module was
given (whole, sliced or pooled) is *kept*. A *join* concatenates maps along the channels, at least
one of them new.
"""

from collections.abc import Set

from se_inject.graph.recording.history import UNKNOWN
from se_inject.reasons import Reason
from se_inject.sites.unit_flow import UnitFlow
from se_inject.sites.unit_point import Found, Unit


def find_joins(flow: UnitFlow, residual: Set[str]) -> Found:
    """The units that end at a join.

    Args:
        residual: the blocks that have residual additions. A join in, around or beside one of them
            is not a unit.
    """
    joins = _joins_by_call(flow)
    units: list[tuple[int, Unit | Reason]] = []  # each with the call that is the whole unit
    for call in joins:
        units += _units_of(flow, call, joins)
    whole = {call for call, _ in units}
    found = Found()
    for call, unit in units:
        callers = flow.history.callers(call)
        if whole & set(callers[1:]):
            continue  # the outermost unit wins
        inside = {
            other.name
            for other in flow.calls[call:]
            if other.start >= flow.calls[call].start and other.end <= flow.calls[call].end
        }
        if residual & ({flow.name(c) for c in callers} | inside):
            continue
        if isinstance(unit, Reason):
            found.skip(flow.name(call), unit, 0)
        elif flow.is_gated(unit.first, unit.end):
            inner = flow.calls[unit.calls[0]]
            found.skip(inner.name, Reason.UNIT_GATED, unit.end - inner.start)
        else:
            found.units.append(unit)
    return found


def _joins_by_call(flow: UnitFlow) -> dict[int, list[int]]:
    joins: dict[int, list[int]] = {}
    for number, event in enumerate(flow.events):
        if event.joined and flow.is_map(number):
            joins.setdefault(event.call, []).append(number)
    return joins


def _units_of(
    flow: UnitFlow, call: int, joins: dict[int, list[int]]
) -> list[tuple[int, Unit | Reason]]:
    """The units that the joins of one call make, each with the call that is the whole unit."""
    start, end = flow.calls[call].start, flow.calls[call].end
    own = [j for j in joins[call] if not _is_part(flow, j, joins[call], start)]
    found: list[tuple[int, Unit | Reason]] = []
    earlier: list[int] = []
    for number, join in enumerate(own):
        passed = [k for k in earlier if flow.dominates(k, join, start)]
        stop = frozenset(passed[-1:])
        joined = set(flow.events[join].joined)
        new = {m for m in joined if flow.convolutions(flow.back(m, start, stop))}
        kept = joined - new
        if not new or (len(new) == 1 and not _same_origin(flow, new, kept, start, stop)):
            continue
        earlier.append(join)
        first = max(stop) + 1 if stop else start
        is_last = number == len(own) - 1
        following = flow.after(join, end)
        if is_last and flow.calls[call].parent is not None and flow.convolutions(following):
            found.append((call, _at_output(flow, call, join, first)))
        elif (caller := _caller_that_goes_on(flow, call, join, joins)) is not None:
            found.append((caller, _at_output(flow, caller, join, flow.calls[caller].start)))
        else:
            found += [(call, u) for u in _at_join(flow, call, join, new, kept, first, stop)]
    return found


def _is_part(flow: UnitFlow, join: int, joins: list[int], start: int) -> bool:
    """Whether a later join takes this one in, beside maps that did not pass through it."""
    return any(
        k > join
        and join in flow.back(k, start)
        and not all(join in flow.back(m, start) for m in flow.events[k].joined)
        for k in joins
    )


def _same_origin(flow: UnitFlow, new: Set[int], kept: Set[int], start: int, stop: Set[int]) -> bool:
    """Whether the one new map was made from the maps kept beside it. In a U-Net it was not."""
    (branch,) = new
    origin = flow.entries(branch, start, stop)
    return bool(kept) and all(k != UNKNOWN and flow.entries(k, start, stop) & origin for k in kept)


def _caller_that_goes_on(
    flow: UnitFlow, call: int, join: int, joins: dict[int, list[int]]
) -> int | None:
    """The caller, if its own forward goes on with a convolution and joins nothing else."""
    caller = flow.calls[call].parent
    if caller is None or flow.calls[caller].parent is None or flow.is_container(caller):
        return None
    start, end = flow.calls[caller].start, flow.calls[caller].end
    others = any(
        k != call
        and flow.calls[k].start >= start
        and flow.calls[k].end <= end
        and call not in flow.history.callers(k)
        for k in joins
    )
    behind = [x for x in flow.after(join, end) if x >= flow.calls[call].end]
    return caller if flow.convolutions(behind) and not others else None


def _at_output(flow: UnitFlow, call: int, join: int, first: int) -> Unit | Reason:
    """A unit at the output of a module that goes on after its join, before dropout and scales."""
    start = flow.calls[call].start
    outputs = {
        v
        for v in flow.calls[call].outputs
        if v == join or (v >= start and join in flow.back(v, start))
    }
    if len(outputs) != 1 or not flow.is_map(next(iter(outputs))):
        return Reason.SEVERAL_ENDS
    end = flow.before_tail(outputs.pop(), start)
    return Unit((call,), end, first)


def _at_join(
    flow: UnitFlow,
    call: int,
    join: int,
    new: Set[int],
    kept: Set[int],
    first: int,
    stop: Set[int],
) -> list[Unit]:
    """A unit on the one new map, on each new map beside a kept one, or on the concatenation."""
    start = flow.calls[call].start
    if len(new) == 1:
        (branch,) = new
        return [Unit((call,), branch, first)]
    if any(_is_unpooled(flow, m, start, stop) for m in kept):
        return [_in_the_child_that_makes_it(flow, call, m) for m in sorted(new)]
    short, long = sorted(new, key=lambda m: flow.depth(m, start, stop))[:2]
    pair = len(flow.events[join].joined) == 2 and not kept
    if pair and _is_projection(flow, short, long, start, stop):
        return [Unit((call,), long, first)]
    return [Unit((call,), join, first)]


def _is_unpooled(flow: UnitFlow, v: int, start: int, stop: Set[int]) -> bool:
    path = flow.back(v, start, stop)
    return not any(flow.events[x].op.is_pooling for x in path)


def _is_projection(flow: UnitFlow, short: int, long: int, start: int, stop: Set[int]) -> bool:
    """Whether ``short`` is a shorter, straight path on which at most one layer mixes channels."""
    path = flow.back(short, start, stop)
    straight = all(len(set(flow.events[x].sources)) <= 1 for x in path)
    shorter = flow.depth(short, start, stop) < flow.depth(long, start, stop)
    return straight and shorter and flow.depth(short, start, stop, mixing=True) <= 1


def _in_the_child_that_makes_it(flow: UnitFlow, call: int, v: int) -> Unit:
    """A unit on a new map of a dense block: in the map's own layer, or else in the block."""
    for child, record in enumerate(flow.calls):
        layer = record.parent == call and bool(flow.module(child)._modules)
        if layer and record.outputs == (v,) and not flow.is_container(child) and flow.once(child):
            return Unit((child, call), flow.before_tail(v, record.start), record.start)
    return Unit((call,), v, v)
