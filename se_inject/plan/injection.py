"""The options of an injection. Each is written once, with its default and its help text."""

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
    """Make a field of a dataclass of options.

    Args:
        default: the value if nobody gives one.
        text: the help on the command line, in full sentences and with the unit.
        command_line: other arguments of ``typer.Option`` (metavar, min, max, show_default), and
            three of our own: ``panel`` names the part of the help, ``argument=True`` makes a
            positional argument, and ``alias`` is a name that the option had once.
    """
    return dataclasses.field(default=default, metadata={"help": text, **command_line})


_PANEL = "The SE blocks"


@dataclass(frozen=True, kw_only=True)
class Injection:
    """What is inserted, and where. Commands, plans, exports and fine-tuning pass this object on.

    :func:`se_inject.plan_se` explains the fields. They are given by name, so that a class that
    inherits them (the settings of a fine-tuning run) can have its own fields first.
    """

    r: Ratio = option(
        16,
        "The reduction ratio: an SE block of C channels has a bottleneck of C / N. 'layer4.*=32,16'"
        " gives the blocks that match a glob another one; the first match wins. May be given"
        " several times.",
        metavar="N | GLOB=N,...",
        panel=_PANEL,
    )
    divisor: int = option(
        8,
        "The width of every bottleneck is rounded to a multiple of this number, and is never"
        " smaller (timm's rd_divisor).",
        panel=_PANEL,
    )
    include: Patterns = option(
        None,
        "Only blocks whose names match this glob are taken, such as 'layer4.*'. May be given"
        " several times.",
        show_default="all",
        panel=_PANEL,
    )
    exclude: Patterns = option(
        None,
        "Blocks whose names match this glob are left out, even where --include names them. May be"
        " given several times.",
        show_default="none",
        panel=_PANEL,
    )
    where: Where = option(
        "auto",
        "What gets SE blocks. residual: residual branches alone. units: also the ends of Inception"
        " modules, dense layers, and convolutions with their activation. auto: units only in a"
        " network that has no residual addition.",
        panel=_PANEL,
    )
    placement: Placement = option(
        "standard",
        "Where in a residual block the SE block goes. "
        + "; ".join(f"{name}: {rule.text}" for name, rule in PLACEMENTS.items())
        + ".",
        panel=_PANEL,
    )
    squeeze: Squeeze = option(
        "avg",
        "What the two layers of an SE block see: the mean of each channel (avg), its maximum (max),"
        " or every position of the map by itself (none).",
        panel=_PANEL,
    )
    gate: Gate = option(
        "sigmoid", "The function that makes the gate, at the end of the excitation.", panel=_PANEL
    )
    bias: bool = option(True, "Whether the two layers of an SE block have biases.", panel=_PANEL)
    shift: bool = option(
        False,
        "The SE blocks also add a number to each channel behind its gate (SE with an additive bias,"
        " as in chess networks).",
        panel=_PANEL,
    )
    init: Init = option(
        "identity",
        "How the SE blocks start. identity: every gate is 1, and the network computes what it did"
        " before. paper: random layers and a plain gate, as in the paper. With --attention:"
        " identity, or as timm builds them.",
        panel=_PANEL,
    )
    attention: str | SELayer | None = option(
        None,
        f"Insert another attention layer of timm in place of SE blocks: {', '.join(ATTENTIONS)}.",
        metavar="NAME",
        show_default="none",
        panel=_PANEL,
    )

    strict: bool = option(
        False,
        "Make it an error, and not a warning, when a residual block cannot get an SE block.",
        panel=_PANEL,
    )

    @property
    def variant(self) -> Variant:
        """Which SE block is inserted, and where at an addition it goes."""
        return Variant(
            self.placement, self.squeeze, self.gate, self.bias, self.init, self.divisor, self.shift
        )

    @property
    def se_layer(self) -> SELayer | None:
        """What makes the layers in place of SE blocks: ``channels -> nn.Module``.

        Layers of timm begin as the identity if ``init`` says so. A user's own callable decides how
        its layers begin.
        """
        layer = Attention(self.attention) if isinstance(self.attention, str) else self.attention
        if isinstance(layer, Attention) and self.init == "identity":
            return FromIdentity(layer)
        return layer
