"""Options of the command line that say which blocks are put where: one text for all commands."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from se_inject.layers.attention import ATTENTIONS
from se_inject.layers.gates import Gate, Init
from se_inject.layers.squeezes import Squeeze
from se_inject.plan.injection import Injection
from se_inject.sites.placements import Placement
from se_inject.sites.scaled import Where

_PANEL = "The SE blocks"


def _option(*names: str, **kwargs: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_PANEL, **kwargs)


RatioOption = Annotated[
    list[str],
    _option(
        "--r",
        metavar="N | GLOB=N,...",
        help="Reduction ratio C / rd of the SE bottleneck; by block name, first match wins:"
        " 'layer4.*=32,16'. Repeatable.",
    ),
]
DivisorOption = Annotated[
    int, _option(help="Bottleneck widths are multiples of this, and at least this.")
]
IncludeOption = Annotated[
    list[str] | None,
    _option(
        help="Only blocks that match this glob, such as 'layer4.*'. Repeatable.",
        show_default="all",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    _option(
        help="No blocks that match this glob; wins over --include. Repeatable.",
        show_default="none",
    ),
]
WhereOption = Annotated[
    Where, _option(help=Injection.__dataclass_fields__["where"].metadata["help"])
]
PlacementOption = Annotated[
    Placement,
    _option(
        help="standard: on the branch before the addition; pre: on what the branch reads; post:"
        " behind the addition and its ReLU; identity: on the shortcut; 3x3: behind the branch's"
        " last spatial convolution and its norm."
    ),
]
SqueezeOption = Annotated[
    Squeeze,
    _option(help="Mean or maximum over the map, or none: the layers at every position."),
]
GateOption = Annotated[Gate, _option(help="What the excitation ends with.")]
BiasOption = Annotated[bool, _option("--bias/--no-bias", help="Biases of the two SE layers.")]
InitOption = Annotated[
    Init, _option(help="Start as the base network, or with the paper's random gates.")
]
AttentionOption = Annotated[
    str | None,
    _option(
        metavar="NAME",
        help=f"Another layer of timm in place of SE: {', '.join(ATTENTIONS)}.",
        show_default="none",
    ),
]


def parse_ratio(values: Sequence[str]) -> int | dict[str, int]:
    """``r`` of the API from ``--r`` values: a number, or globs with numbers.

    A number without a glob is for all blocks that no glob matches.

    >>> parse_ratio(["16"]), parse_ratio(["layer4.*=32,layer1.*=8", "16"])
    (16, {'layer4.*': 32, 'layer1.*': 8, '*': 16})

    Raises:
        typer.BadParameter: no whole number, or two for one glob.
    """
    ratios: dict[str, int] = {}
    rest: list[int] = []
    for entry in (part.strip() for value in values for part in value.split(",")):
        glob, equals, number = (part.strip() for part in entry.rpartition("="))
        try:
            r = int(number)
        except ValueError:
            raise typer.BadParameter(
                f"{entry!r} is neither a whole number nor GLOB=NUMBER, such as 'layer4.*=32'.",
                param_hint="--r",
            ) from None
        if not equals:
            rest.append(r)
        elif not glob or glob in ratios:
            what = "names no blocks" if not glob else "gives a glob a second number"
            raise typer.BadParameter(f"{entry!r} {what}.", param_hint="--r")
        else:
            ratios[glob] = r
    if len(rest) > 1 or (rest and "*" in ratios):
        raise typer.BadParameter(
            f"more than one number is for all blocks: {', '.join(values)}.", param_hint="--r"
        )
    if not ratios:
        return rest[0]
    if rest:
        ratios["*"] = rest[0]  # last: the globs before it win
    return ratios
