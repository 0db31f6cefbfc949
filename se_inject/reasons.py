"""Why an addition of two maps gets no SE block, and the record of one that gets none."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why an addition gets no SE block."""

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
    EXCLUDED = "excluded by the user"
    NOT_REACHED = "not reached by the recorded forward"


# Of blocks that look residual: they would get an SE block if the forward were written otherwise.
UNSERVED = frozenset(
    {
        Reason.HIDDEN,
        Reason.UNTRACED,
        Reason.MODES_DIFFER,
        Reason.CHANNELS_UNKNOWN,
        Reason.SHARED_IN_PLACE,
        Reason.WIDTHS,
    }
)


@dataclass(frozen=True)
class Skipped:
    """An addition of two maps that gets no SE block (once, however often its block is called).

    With ``Reason.NOT_REACHED`` it is no addition, but what comes after the point where the
    recorded forward stopped, or a way that it took for no value (``if x.mean() > 0``).
    """

    block: str
    reason: str
    detail: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"block": self.block, "reason": self.reason, "detail": self.detail}
