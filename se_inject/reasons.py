"""The reasons why an addition of two maps or a unit gets no SE block, and the record of a case."""

from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why an addition, or a unit of a network without residual additions, gets no SE block."""

    GATED = "the branch already has channel attention"
    REPARAMETERISABLE = "re-parameterisable sum"
    FUSION = "fusion, not residual (neither operand is a shortcut)"
    NO_CONVOLUTION = "no convolution on the branch"
    TOKENS = "tokens, not a feature map"
    NO_MAP = "more than five dims or not real numbers, no feature map"
    WIDTHS = "called with different numbers of channels"
    INNER = "inside the branch of another residual addition"
    SCALED = "scaled addition (alpha is not 1)"
    LAYOUT = "se_layer takes [N, C, H, W], and this map has another layout"
    IMAGE = "at most three channels: an image, no feature map"
    BLENDED = "two maps mixed by a function that is no sum of both (lerp, a mean, index_add, ...)"
    INSIDE_CHILD = "the place for this placement is inside a child that returns several maps"
    CHANNELS_UNKNOWN = "cannot tell which dim holds the channels"
    SHARED_IN_PLACE = "changes in place a map that is read again"
    SEVERAL_INPUTS = "pre: the branch reads several maps"
    NO_SPATIAL = "3x3: no spatial convolution on the branch"
    SIDE_BY_SIDE = "3x3: the branch's last spatial convolution sees a part of it only"
    CONVOLUTION_INSIDE = "3x3: a child has the spatial convolution and another one behind it"
    HIDDEN = "inside a function that fx does not enter"
    UNTRACED = "cannot be traced"
    FOREIGN = "TorchScript or quantized, so its inside is not planned"
    MODES_DIFFER = "train and eval mode add different maps"
    INJECTED = "has an SE block of se_inject already"
    UNIT_GATED = "the unit already has channel attention"
    ONE_POSITION = "the unit's map has one position only"
    NOTHING_LEARNS = "nothing that learns comes after the unit"
    SHARED_ACTIVATION = "an activation that several units share"
    SEVERAL_ENDS = "the unit does not end in one map"
    UNIT_INSIDE_CHILD = "the unit ends inside a child"
    EXCLUDED = "excluded by the user"
    NOT_REACHED = "not reached by the recorded forward"

    @property
    def is_gap(self) -> bool:
        """Whether the block may be residual, and only how it is written keeps it from SE."""
        return self in _GAPS


_GAPS = {
    Reason.WIDTHS,
    Reason.CHANNELS_UNKNOWN,
    Reason.SHARED_IN_PLACE,
    Reason.HIDDEN,
    Reason.UNTRACED,
    Reason.MODES_DIFFER,
}


# These reasons are given for units, not for additions.
UNIT_REASONS = frozenset(
    {
        Reason.UNIT_GATED,
        Reason.ONE_POSITION,
        Reason.NOTHING_LEARNS,
        Reason.SHARED_ACTIVATION,
        Reason.SEVERAL_ENDS,
        Reason.UNIT_INSIDE_CHILD,
    }
)


@dataclass(frozen=True)
class Skipped:
    """An addition of two maps that gets no SE block.

    It is listed once, however often its block is called. Where the plan looks for units, the entry
    may be a unit instead, such as a concatenation that has a gate already.

    With ``Reason.NOT_REACHED`` the entry is not an addition. It stands for the code after the point
    where the recorded forward stopped, or for a path that the recording could not take because it
    has no values to decide by (``if x.mean() > 0``).
    """

    block: str
    reason: str
    detail: str = ""
    looks_residual: bool = field(default=True, repr=False)  # a guess where the block has no graph

    def to_dict(self) -> dict[str, str]:
        return {"block": self.block, "reason": self.reason, "detail": self.detail}
