"""What a forward is given when it is recorded: the user's example, or inputs that fit most."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from se_inject.graph.record import Arguments


def example_inputs(model: nn.Module, example_input: Any = None) -> list[Arguments]:
    """The (args, kwargs) to try in turn, on meta: the user's, or those that fit most networks."""
    dtype = floating_dtype(model)
    if example_input is not None:
        on_meta = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), example_input)
        if isinstance(on_meta, Mapping):
            return [((), dict(on_meta))]
        return [(on_meta if isinstance(on_meta, tuple) else (on_meta,), {})]
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    first_conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    spaces: list[tuple[int, ...]]
    if size:
        spaces = [tuple(size[1:])]
    elif isinstance(first_conv, nn.Conv3d):
        spaces = [(16, side, side) for side in (112, 224, 64)]
    else:
        # A hand-written network for small images flattens to a fixed size and rejects 224 pixels.
        spaces = [(side, side) for side in (224, 32, 64, 28, 96, 128, 256, 512)]
    channels = [size[0] if size else 3]
    if first_conv is not None and first_conv.in_channels not in channels:
        channels.append(first_conv.in_channels)
    # Two images, so that a batch norm in train mode has more than one value for a 1x1 map; and
    # as many such arguments as the forward requires (optical flow takes two frames).
    return [
        ((torch.empty(2, c, *space, dtype=dtype, device="meta"),) * _required_arguments(model), {})
        for space in spaces
        for c in channels
    ]


def _required_arguments(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))


def floating_dtype(model: nn.Module) -> torch.dtype:
    """What the weights have, and so most probably what the forward wants its input in."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
