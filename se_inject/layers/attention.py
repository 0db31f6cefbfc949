"""The other attention layers of timm by name, each of which can be the ``se_layer``."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from torch import nn

from se_inject.errors import ArgumentError

# The names that timm.layers.create_attn knows (timm 1.0.31). timm has no list of them.
ATTENTIONS: tuple[str, ...] = (
    "se",
    "ese",
    "eca",
    "ecam",
    "ceca",
    "ge",
    "gc",
    "gca",
    "cbam",
    "lcbam",
)
ATTENTIONS += ("coord", "scoord", "ela", "strip", "sk", "splat")
ATTENTIONS += ("lambda", "bottleneck", "halo", "nl", "bat")


@dataclass(frozen=True)
class Attention:
    """``channels -> nn.Module``: one of the layers of ``timm.layers.create_attn``.

    The layers are built with timm's defaults. They do not begin as the identity by themselves, but
    ``init="identity"`` puts each of them into an ``IdentityStart``.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in ATTENTIONS:
            near = difflib.get_close_matches(self.name, ATTENTIONS, n=3, cutoff=0.3) or ATTENTIONS
            raise ArgumentError(f"no attention {self.name!r} in timm; use {', '.join(near)}.")

    def __call__(self, channels: int) -> nn.Module:
        from timm.layers import create_attn

        try:
            layer: nn.Module = create_attn(self.name, channels)
        except AssertionError as error:
            if "Invalid attn module" in str(error):
                raise ArgumentError(
                    f"timm {version('timm')} has no attention {self.name!r}: upgrade timm."
                ) from error
            raise
        except TypeError:
            if self.name != "ge":
                raise
            layer = _gather_excite(channels)
        return layer

    def text(self, channels: int) -> str:
        """The name of the layer in a message."""
        return f"create_attn({self.name!r}, {channels})"


def _gather_excite(channels: int) -> nn.Module:
    """GatherExcite with timm's defaults, which timm 1.0.31 itself cannot build.

    timm passes the device to the perceptron in the position of another argument.
    """
    from timm.layers import ConvMlp, create_attn, make_divisible

    layer: nn.Module = create_attn("ge", channels, use_mlp=False)
    layer.mlp = ConvMlp(channels, make_divisible(channels / 16, 1, round_limit=0.0))
    return layer


SELayer = Callable[[int], nn.Module]
