"""Tells which product of two tensors is a map times its gate, with one number for each channel.

A gate is the same at every position. It was squeezed from a map, and has passed through a layer or
a sigmoid since then.
"""

from collections.abc import Sequence

from torch import Tensor

from se_inject.graph.operations.ops import ADD, EXCITE, SIGMOID
from se_inject.graph.operations.value import Known, Value


def gates(of_x: Known, of_gate: Known) -> bool:
    """Whether ``x * gate`` scales each channel of the map ``x`` by the same number everywhere."""
    x, gate = of_x.tensor, of_gate.tensor
    if x.dim() < 3 or not of_gate.excited or _is_spatial_gate(x, gate):
        return False
    if not of_gate.squeezed:  # it comes from a time or a style, not from a map
        return False
    if x.dim() == 3 and of_x.channel_dim != 1:  # these are tokens, which attention multiplies
        return False
    if of_x.flat or _is_single(x):
        # A 1x1 map (of a small image) is flat itself. Then only a sigmoid tells a gate from a
        # product of two maps. But x * sigmoid(x) is an activation.
        return of_gate.sigmoid_of is not None and of_gate.sigmoid_of != id(x)
    return True


def followed(
    name: str, sources: Sequence[Known], out: Tensor, value: Value, channel_dim: int | None
) -> Known:
    """What is known about the output of the function called ``name``."""
    flat = out.dim() <= 2 or _is_single(out) or all(s.flat for s in sources)
    squeezed = flat and any(s.squeezed or (not s.flat and s.tensor.dim() >= 3) for s in sources)
    excited = flat and (name in EXCITE or any(s.excited and s.flat for s in sources))
    sigmoid_of = id(sources[0].tensor) if name in SIGMOID else None
    if sigmoid_of is None and name not in ADD and len(sources) == 1:
        sigmoid_of = sources[0].sigmoid_of  # it passes through a view, an expansion or a factor
    return Known(out, value, channel_dim, flat, squeezed, excited, sigmoid_of)


def _is_single(x: Tensor) -> bool:
    """Whether a map has one position only (channels first or last)."""
    return x.dim() >= 3 and (
        all(size == 1 for size in x.shape[2:]) or all(size == 1 for size in x.shape[1:-1])
    )


def _is_spatial_gate(x: Tensor, gate: Tensor) -> bool:
    """Whether ``gate`` has one number for all channels of ``x``, such as a path weight."""
    if gate.dim() != x.dim():
        return gate.dim() < 2
    return all(size == 1 for size in gate.shape[1:])
