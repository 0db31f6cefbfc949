"""The options of an injection, each of them once: its default and the help of the command line."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from se_inject.layers.attention import ATTENTIONS, Attention, SELayer
from se_inject.layers.gates import Gate, Init
from se_inject.layers.identity_start import FromIdentity
from se_inject.layers.squeezes import Squeeze
from se_inject.layers.variant import Variant
from se_inject.names import Patterns
from se_inject.sites.placements import PLACEMENTS, Placement
from se_inject.sites.scaled import Where

Ratio = int | Mapping[str, int]


def option(default: Any, text: str, **command_line: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where nobody gives one.
        text: the help of the command line: a full sentence with the unit.
        command_line: what else ``typer.Option`` takes (metavar, min, max, show_default), ``panel``
            for the part of the help, ``argument=True`` for what has no name before it, ``alias``
            for a name that it had once.
    """
    return dataclasses.field(default=default, metadata={"help": text, **command_line})


_PANEL = "The SE blocks"


@dataclass(frozen=True, kw_only=True)
class Injection:
    """What goes where. Commands, plans, exports and fine-tuning runs hand this one object on.

    The fields are explained in :func:`se_inject.plan_se`. They are given by name, so that a class
    that inherits them (the settings of a fine-tuning run) has its own ones first.
    """

    r: Ratio = option(
        16,
        "The reduction ratio C / rd of the SE bottlenecks; by block name, where the first match"
        " wins: 'layer4.*=32,16'. May be given several times.",
        metavar="N | GLOB=N,...",
        panel=_PANEL,
    )
    divisor: int = option(
        8,
        "Every bottleneck width is a multiple of this, and at least this (timm's rd_divisor).",
        panel=_PANEL,
    )
    include: Patterns = option(
        None,
        "Only blocks that match this glob get SE blocks, such as 'layer4.*'. May be given several"
        " times.",
        show_default="all",
        panel=_PANEL,
    )
    exclude: Patterns = option(
        None,
        "No block that matches this glob gets one; this wins over --include. May be given several"
        " times.",
        show_default="none",
        panel=_PANEL,
    )
    where: Where = option(
        "auto",
        "On residual branches; or on units too: the ends of Inception modules, dense layers,"
        " convolutions with their activation. auto: on units only where the network adds no maps.",
        panel=_PANEL,
    )
    placement: Placement = option(
        "standard",
        "Where the SE blocks go: "
        + "; ".join(f"{name}: {rule.text}" for name, rule in PLACEMENTS.items())
        + ".",
        panel=_PANEL,
    )
    squeeze: Squeeze = option(
        "avg",
        "What the two layers see: the mean or the maximum of the map, or none: every position.",
        panel=_PANEL,
    )
    gate: Gate = option("sigmoid", "The function that the excitation ends with.", panel=_PANEL)
    bias: bool = option(True, "Whether the two SE layers have biases.", panel=_PANEL)
    shift: bool = option(
        False,
        "The SE blocks also add a number to each channel behind its gate (SE with an additive bias,"
        " as in chess networks).",
        panel=_PANEL,
    )
    init: Init = option(
        "identity",
        "The SE blocks start as the identity, or as in the paper with random gates. With"
        " --attention: the layers start as the identity, or as timm builds them.",
        panel=_PANEL,
    )
    attention: str | SELayer | None = option(
        None,
        f"Another attention layer of timm goes in in place of SE: {', '.join(ATTENTIONS)}.",
        metavar="NAME",
        show_default="none",
        panel=_PANEL,
    )

    strict: bool = option(
        False,
        "A residual block that cannot be served is an error, not a warning.",
        panel=_PANEL,
    )

    @property
    def variant(self) -> Variant:
        """The SE block, and where at an addition it goes."""
        return Variant(
            self.placement, self.squeeze, self.gate, self.bias, self.init, self.divisor, self.shift
        )

    @property
    def se_layer(self) -> SELayer | None:
        """What goes in in place of SE blocks: ``channels -> nn.Module``.

        Layers of timm begin as the identity where ``init`` says so. A user's own callable says
        itself how its layers begin.
        """
        layer = Attention(self.attention) if isinstance(self.attention, str) else self.attention
        if isinstance(layer, Attention) and self.init == "identity":
            return FromIdentity(layer)
        return layer
