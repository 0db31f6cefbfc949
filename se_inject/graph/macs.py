"""Counts the multiply-accumulates of a forward on meta tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from se_inject.graph.meta import on_meta


def run_and_count(
    twin: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, int]:
    """The output of a module on meta, and the MACs of that forward.

    ``torch.utils.flop_counter`` counts the FLOPs of convolutions and matrix products. Half of them
    are the MACs. Pooling, norms, activations and additions are not counted.

    Args:
        twin: a :func:`se_inject.graph.copies.meta_copy` of the module.
        args, kwargs: the arguments of its forward, on meta.
    """
    from torch.utils.flop_counter import FlopCounterMode  # most plans do not need it

    with on_meta(), FlopCounterMode(display=False) as counter:
        output = twin(*args, **kwargs)
    return output, counter.get_total_flops() // 2
