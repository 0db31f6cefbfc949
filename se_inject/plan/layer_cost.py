"""Finds out what a user's ``se_layer`` costs by running it on meta tensors."""

from collections.abc import Sequence

import torch
from torch import nn

from se_inject.errors import ArgumentError, SEInjectError, first_line
from se_inject.graph.copies import meta_copy
from se_inject.graph.macs import run_and_count
from se_inject.layers.attention import Attention, SELayer
from se_inject.layers.cost import SECost
from se_inject.layers.identity_start import without_start


def layer_cost(
    se_layer: SELayer, channels: int, dtype: torch.dtype, spaces: Sequence[Sequence[int]]
) -> SECost:
    """What a user's layer adds: its parameters, and the MACs that the flop counter counts.

    Args:
        se_layer: ``channels -> nn.Module``.
        channels, dtype: the channels and the dtype of the map.
        spaces: the (H, W) of the map, one for each call of the block in a forward.

    Raises:
        ArgumentError: the layer cannot be built or run, or does not keep the shape of the map.
    """
    text = f"se_layer({channels})"
    if isinstance(named := without_start(se_layer), Attention):
        text = named.text(channels)
    try:
        with torch.device("meta"):
            layer = se_layer(channels)
    except SEInjectError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ArgumentError(_fault(text, error)) from error
    if not isinstance(layer, nn.Module):
        raise ArgumentError(f"{text} returned {type(layer).__name__}. It must return an nn.Module.")
    # A copy is run, because the layer itself may be in use elsewhere. The copy is in eval mode,
    # because in train mode a norm may need more than one image.
    layer = meta_copy(layer)
    layer.to(dtype)
    macs = 0
    for space in spaces:
        x = torch.empty(1, channels, *space, dtype=dtype, device="meta")
        try:
            out, count = run_and_count(layer, (x,), {})
            shape = tuple(out.shape)
        except Exception as error:  # the user's code may raise anything
            raise ArgumentError(_fault(f"{text} on a map {list(x.shape)}", error)) from error
        if shape != tuple(x.shape):
            raise ArgumentError(
                f"{text} turns a map {list(x.shape)} into {list(shape)}; it must keep the shape."
            )
        macs += count
    params = sum(p.numel() for p in layer.parameters())
    return SECost(params=params, layers=macs, squeeze=0, scale=0)


def _fault(what: str, error: Exception) -> str:
    said = f": {text}" if (text := first_line(error)) else ""
    return (
        f"{what} fails ({type(error).__name__}{said}). Exclude such blocks, or use another layer."
    )
