"""Counts the parameters and MACs of the whole network, before and after the injection.

A MAC is one multiply-accumulate. 1 MAC = 2 FLOPs, and the papers' GFLOPs are GMACs. For the base
network, ``torch.utils.flop_counter`` counts the FLOPs of one image in eval mode, and half of them
are the MACs. It counts convolutions and matrix products, but no pooling, norm, activation or
addition. :class:`se_inject.layers.cost.SECost` says what is counted for the added blocks.
"""

from dataclasses import dataclass

from torch import nn

from se_inject.graph.copies import meta_copy
from se_inject.graph.example import batch_size
from se_inject.graph.macs import run_and_count
from se_inject.graph.meta import needs_values
from se_inject.graph.recording.call import Arguments
from se_inject.plan.plan import Plan


@dataclass(frozen=True)
class Count:
    """Parameters, and the MACs for one image (None if the forward cannot run on meta tensors)."""

    params: int
    macs: int | None

    def to_dict(self) -> dict[str, int | None]:
        return {"params": self.params, "macs": self.macs}


@dataclass(frozen=True)
class Costs:
    """The costs of a planned injection: the base network, the SE blocks, and both together."""

    base: Count
    added: Count
    augmented: Count


def count_costs(plan: Plan) -> Costs:
    """Count a plan's model as it is, the planned SE blocks, and the sum."""
    base = count_model(plan.model, plan.example)
    added = Count(plan.added.params, plan.added.macs)
    together = None if base.macs is None else base.macs + plan.added.macs
    return Costs(base, added, Count(base.params + plan.added.params, together))


def count_model(model: nn.Module, example: Arguments) -> Count:
    """Count one model on meta tensors. The model itself is neither run nor changed.

    Args:
        model: any module.
        example: the (args, kwargs) of its forward, as in ``Plan.example``.
    """
    params = sum(p.numel() for p in model.parameters())
    args, kwargs = example
    # A list of single images [C, H, W] is a batch too, but a detector's forward stops early.
    batch = batch_size(example)
    twin = meta_copy(model)
    try:
        _, macs = run_and_count(twin, args, kwargs)
    except Exception as error:
        if needs_values(error):  # The plan has warned about this.
            return Count(params, None)
        raise
    return Count(params, macs // batch)
