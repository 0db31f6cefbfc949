"""What would be injected into one model: its sites, its skipped additions, and ``apply``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from se_inject.edit.insert import insert, withdraw
from se_inject.edit.site import Site
from se_inject.graph.example import item_size
from se_inject.graph.recording.call import Arguments
from se_inject.graph.thread_state import modes_kept
from se_inject.graph.trace import TracedBlock
from se_inject.layers.attention import SELayer
from se_inject.layers.cost import SECost, sum_costs
from se_inject.layers.identity_start import without_start
from se_inject.layers.variant import Variant
from se_inject.plan.injection import Ratio
from se_inject.plan.verify import verify
from se_inject.reasons import Skipped
from se_inject.sites.scaled import Where

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Plan:
    """What :func:`inject_se` would do to one model. ``print`` it with rich, or ``apply`` it."""

    model: nn.Module = field(repr=False, compare=False)
    r: Ratio
    where: Where
    variant: Variant
    se_layer: SELayer | None  # if it is given, only the placement of the variant counts
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    gaps: str | None  # one line about the blocks that look residual but get no SE block
    example: Arguments = field(repr=False, compare=False)  # the arguments of the recorded forward
    blocks: Mapping[str, TracedBlock] = field(repr=False, compare=False)
    modules: Mapping[str, nn.Module] = field(repr=False, compare=False)  # those that have a site

    @property
    def input_size(self) -> list[int]:
        """The size of one image, [C, H, W], in the first tensor that the forward takes."""
        return item_size(self.example)

    @property
    def added(self) -> SECost:
        """The parameters and MACs that all sites together add."""
        return sum_costs(site.cost for site in self.sites)

    @modes_kept
    def apply(self) -> nn.Module:
        """Insert the SE blocks into the model, in place, and return it.

        If the weights are real, a copy of one block of each kind is tried first.

        Raises:
            UnsupportedModelError: a block would compute something else, does not take its SE block,
                or was replaced after the plan was made.
        """
        verify(self.sites, self.modules, self.blocks, self.variant)
        return insert(
            self.model,
            self.sites,
            self.modules,
            self.blocks,
            where=self.where,
            variant=self.variant,
            se_layer=self.se_layer,
            example=self.example,
        )

    def withdraw(self) -> None:
        """Take out what :meth:`apply` inserted. SE blocks that were there before stay."""
        withdraw(self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {
            "r": dict(self.r) if isinstance(self.r, Mapping) else self.r,
            "where": self.where,
            "variant": self.variant.to_dict()
            if self.se_layer is None
            else {"placement": self.variant.placement, "attention": layer_name(self.se_layer)},
            "added": {"params": self.added.params, "macs": self.added.macs},
            "sites": [site.to_dict() for site in self.sites],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
        }

    def __rich__(self) -> "RenderableType":
        from se_inject.plan.table import plan_table  # rich is imported only to print

        return plan_table(self.sites, self.skipped)


def layer_name(se_layer: SELayer) -> str:
    """The name of an attention layer of timm, or of a user's function or class."""
    se_layer = without_start(se_layer) or se_layer
    name = getattr(se_layer, "name", None) or getattr(se_layer, "__name__", None)
    return name if isinstance(name, str) else type(se_layer).__name__
