"""Units in a plain chain: a convolution, its norm and its activation.

The paper has SE blocks in VGG-16 "after the non-linearity following each convolution". A sum of
parallel convolutions that a block can fold into one (RepVGG, MobileOne) counts as one convolution.
"""

from se_inject.reasons import Reason
from se_inject.sites.unit_flow import UnitFlow
from se_inject.sites.unit_point import Found, Unit

_GATE_ACTIVATIONS = ("sigmoid", "hardsigmoid")


def find_chains(flow: UnitFlow) -> Found:
    """The units of a network that has neither residual additions nor joins."""
    found = Found()
    for number, event in enumerate(flow.events):
        if event.op.is_activation and event.sources:
            _judge(flow, number, found)
    return found


def _judge(flow: UnitFlow, activation: int, found: Found) -> None:
    event = flow.events[activation]

    def skip(reason: Reason) -> None:
        call = flow.calls[event.call]
        found.skip(call.name, reason, activation - call.start)

    base = event.sources[0]
    end = _end_of_activation(flow, activation, base)
    if flow.is_map(activation) and base >= 0 and flow.events[base].op.gates:
        skip(Reason.UNIT_GATED)
        return
    convolutions = _convolutions_before(flow, base)
    gate = end == activation and event.op.name.rstrip("_") in _GATE_ACTIVATIONS
    if not convolutions or gate:
        return
    if not flow.is_map(activation):
        if _has_one_position(flow, activation) and not _is_squeezed(flow, convolutions):
            skip(Reason.ONE_POSITION)
        return
    depthwise = all(flow.events[x].op.is_depthwise for x in convolutions)
    if depthwise and _feeds_pointwise(flow, end):
        return  # this is the first half of a separable pair, and the unit ends with the second
    later = flow.events[end + 1 :]
    if not any(e.op.is_convolution or e.op.name in ("linear", "matmul") for e in later):
        skip(Reason.NOTHING_LEARNS)
        return
    read_by_gate = any(flow.events[x].op.gates for x in flow.readers.get(end, []))
    if read_by_gate or _reads_gated(flow, convolutions):
        skip(Reason.UNIT_GATED)
        return
    unit = _place(flow, max(convolutions), end)
    if unit is None:
        skip(Reason.SHARED_ACTIVATION)
    else:
        found.units.append(unit)


def _end_of_activation(flow: UnitFlow, activation: int, base: int) -> int:
    """The event that ends an activation, which for ``x * sigmoid(x)`` is the product."""
    products = [
        x
        for x in flow.readers.get(activation, [])
        if flow.events[x].op.is_product and base in flow.events[x].sources
    ]
    return products[-1] if products else activation


def _convolutions_before(flow: UnitFlow, v: int) -> list[int]:
    """The convolutions that an activation follows: one, or those of a foldable sum."""
    found: list[int] = []
    seen: set[int] = set()
    stack = [v]
    while stack:
        x = stack.pop()
        if x < 0 or x in seen:
            continue
        seen.add(x)
        op, call = flow.events[x].op, flow.events[x].call
        if op.is_convolution:
            found.append(x)
        elif op.adds_maps:
            if not any(map(flow.is_foldable, flow.history.callers(call))):
                return []
            stack += flow.events[x].sources
        elif op.is_affine or op.is_dropout or op.is_permutation or op.name in ("pad", "blur"):
            stack += flow.events[x].sources
    return found


def _has_one_position(flow: UnitFlow, v: int) -> bool:
    shape = flow.events[v].op.shape
    return len(shape) >= 4 and all(size == 1 for size in shape[2:])


def _is_squeezed(flow: UnitFlow, convolutions: list[int]) -> bool:
    """Whether the convolutions read one position too, as in a gate or a classifier."""
    sources = [s for x in convolutions for s in flow.events[x].sources]
    return all(s < 0 or _has_one_position(flow, s) for s in sources)


def _feeds_pointwise(flow: UnitFlow, v: int) -> bool:
    """Whether a convolution that mixes channels, or a gate, reads the map next."""
    readers = flow.readers.get(v, [])
    for _ in range(8):  # this steps over gates, pads and permutations
        if len(readers) == 1 and not flow.events[readers[0]].op.is_convolution:
            readers = flow.readers.get(readers[0], [])
    ops = [flow.events[x].op for x in readers]
    # A re-parameterisable block reads the map with several convolutions, some of them depthwise.
    return any(op.gates or (op.is_convolution and not op.is_depthwise) for op in ops)


def _reads_gated(flow: UnitFlow, convolutions: list[int]) -> bool:
    sources = [s for x in convolutions for s in flow.events[x].sources]
    return any(s >= 0 and flow.events[s].op.gates for s in sources)


def _place(flow: UnitFlow, convolution: int, end: int) -> Unit | None:
    """Where the SE block goes: into the module that runs both, or into the activation's own module.

    No child is added to an ``nn.Sequential``, because others iterate over it. None is added to a
    block that can fold itself, because the block would lose it. The network itself gets a child
    only if there is no other way.
    """
    outer = set(flow.history.callers(flow.events[convolution].call))
    callers = flow.history.callers(flow.events[end].call)
    common = next(call for call in callers if call in outer)
    own = not flow.is_container(common) and flow.once(common) and not flow.is_foldable(common)
    here = Unit((common,), end, convolution)
    if own and flow.calls[common].parent is not None:
        return here
    for call in reversed(callers[: callers.index(common)]):  # the outermost child comes first
        alone = not flow.is_container(call) and flow.once(call)
        if alone and end in flow.calls[call].outputs and not flow.calls[call].call.kwargs:
            return Unit((call,), end, convolution, leaf=True)
    return here if own else None
