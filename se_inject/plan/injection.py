"""The options of an injection, each of them once: its default and the help of the command line."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from se_inject.layers.attention import ATTENTIONS, Attention, SELayer
from se_inject.layers.gates import Gate, Init
from se_inject.layers.squeezes import Squeeze
from se_inject.layers.variant import Variant
from se_inject.names import Patterns
from se_inject.sites.placements import Placement

Ratio = int | Mapping[str, int]


def option(default: Any, text: str, **command_line: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where nobody gives one.
        text: the help of the command line: a full sentence with the unit.
        command_line: what else ``typer.Option`` takes (metavar, min, max, show_default, panel).
    """
    return dataclasses.field(default=default, metadata={"help": text, **command_line})


_PANEL = "The SE blocks"


@dataclass(frozen=True)
class Injection:
    """What goes where. Commands, plans, exports and fine-tuning runs hand this one object on.

    The fields are explained in :func:`se_inject.plan_se`.
    """

    r: Ratio = option(
        16,
        "Reduction ratio C / rd of the SE bottleneck; by block name, first match wins:"
        " 'layer4.*=32,16'. Repeatable.",
        metavar="N | GLOB=N,...",
        panel=_PANEL,
    )
    divisor: int = option(
        8, "Bottleneck widths are multiples of this, and at least this.", panel=_PANEL
    )
    include: Patterns = option(
        None,
        "Only blocks that match this glob, such as 'layer4.*'. Repeatable.",
        show_default="all",
        panel=_PANEL,
    )
    exclude: Patterns = option(
        None,
        "No blocks that match this glob; wins over --include. Repeatable.",
        show_default="none",
        panel=_PANEL,
    )
    placement: Placement = option(
        "standard",
        "standard: on the branch before the addition; pre: on what the branch reads; post:"
        " behind the addition and its ReLU; identity: on the shortcut; 3x3: behind the branch's"
        " last spatial convolution and its norm.",
        panel=_PANEL,
    )
    squeeze: Squeeze = option(
        "avg", "Mean or maximum over the map, or none: the layers at every position.", panel=_PANEL
    )
    gate: Gate = option("sigmoid", "What the excitation ends with.", panel=_PANEL)
    bias: bool = option(True, "Biases of the two SE layers.", panel=_PANEL)
    init: Init = option(
        "identity", "Start as the base network, or with the paper's random gates.", panel=_PANEL
    )
    attention: str | SELayer | None = option(
        None,
        f"Another layer of timm in place of SE: {', '.join(ATTENTIONS)}.",
        metavar="NAME",
        show_default="none",
        panel=_PANEL,
    )

    strict: bool = option(
        False,
        "Make it an error where a block that looks residual gets no SE block.",
        panel=_PANEL,
    )

    @property
    def variant(self) -> Variant:
        """The SE block, and where at an addition it goes."""
        return Variant(self.placement, self.squeeze, self.gate, self.bias, self.init, self.divisor)

    @property
    def se_layer(self) -> SELayer | None:
        """What goes in in place of SE blocks: ``channels -> nn.Module``."""
        return Attention(self.attention) if isinstance(self.attention, str) else self.attention
