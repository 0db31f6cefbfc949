"""What one inserted block costs in parameters and MACs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from se_inject.layers.squeezes import SQUEEZES, Squeeze


@dataclass(frozen=True)
class SECost:
    """What one SE block adds. MACs are for one image; 1 MAC = 2 FLOPs.

    ``layers`` counts the two 1x1 convolutions: C*rd + rd*C, or C*rd + rd*2C with a shift. Without a
    squeeze they run at each position, and the number is multiplied by that of the positions.
    ``squeeze`` (the mean or the maximum) and ``scale`` each count one operation for every element
    of the map: C*H*W, or C*T*H*W for video. The addition of a shift is part of the MAC of the
    scale. Biases, ReLU and the gate are not counted.
    """

    params: int
    layers: int
    squeeze: int
    scale: int

    @property
    def macs(self) -> int:
        return self.layers + self.squeeze + self.scale


def se_cost(
    channels: int,
    bottleneck: int,
    spaces: Sequence[Sequence[int]],
    *,
    squeeze: Squeeze = "avg",
    bias: bool = True,
    shift: bool = False,
) -> SECost:
    """Parameters and MACs of a :class:`SqueezeExcite` block.

    Args:
        channels, bottleneck: C and rd.
        spaces: the (H, W) or (T, H, W) of the map, one for each call of the block in a forward.
        squeeze, bias, shift: the options of the block.
    """
    out = 2 * channels if shift else channels
    weights = (channels + out) * bottleneck
    positions = sum(math.prod(space) for space in spaces)
    pools = SQUEEZES[squeeze].pools
    return SECost(
        params=weights + (bottleneck + out if bias else 0),
        layers=weights * (len(spaces) if pools else positions),
        squeeze=channels * positions if pools else 0,
        scale=channels * positions,
    )


def sum_costs(costs: Iterable[SECost]) -> SECost:
    """The sum of several costs, column by column."""
    columns = zip(*((c.params, c.layers, c.squeeze, c.scale) for c in costs), strict=True)
    return SECost(*(sum(column) for column in columns))
