"""The size of the images that a network is planned with."""

import math
from collections.abc import Mapping

from torch import nn

from se_inject.errors import ArgumentError
from se_inject.layers.layout import first_convolution, kind_of

_LARGEST = 2**40  # elements; a plan needs no memory for them, and torch cannot count much further


def input_size(
    name: str, model: nn.Module, img_size: int | None, in_chans: int | None
) -> tuple[int, ...] | None:
    """[C, H, W] of the images to plan with; [C, T, H, W] of video, [C, L] of sequences.

    A library model's own size, with ``img_size`` as its sides and ``in_chans`` as its channels
    where given; None where nothing is known or given, and the planner finds out.
    """
    size = _trained_size(name, model)
    if size is None and img_size is None and in_chans is None:
        return None
    first = first_convolution(model)
    own_channels = first.in_channels if first is not None else 3
    channels, *space = size or (own_channels, *kind_of(first).spaces[0])
    if img_size is not None:
        space[-2:] = [img_size] * len(space[-2:])
    size = (in_chans or channels, *space)
    if math.prod(size) > _LARGEST:
        raise ArgumentError(f"an input of {' x '.join(map(str, size))} is too large to plan with.")
    return size


def _trained_size(name: str, model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and "input_size" in config:
        return tuple(config["input_size"])
    if type(model).__module__.startswith("torchvision."):
        from torchvision.models import get_model_weights, list_models, video

        name = name.removeprefix("torchvision/")
        for weights in get_model_weights(name) if name in list_models() else ():
            if crop := getattr(weights.transforms(), "crop_size", None):
                clip = (16,) if name in list_models(module=video) else ()
                return (3, *clip, crop[0], crop[-1])
    return None
