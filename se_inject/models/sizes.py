"""The size of the images that a network is planned with."""

import math
from collections.abc import Mapping

from torch import nn

from se_inject.errors import ArgumentError
from se_inject.layers.layout import first_convolution, kind_of

_LARGEST = 2**40  # elements: a plan needs no memory, but torch cannot count much further


def input_size(
    name: str, model: nn.Module, img_size: int | None, in_chans: int | None
) -> tuple[int, ...] | None:
    """The size of one input to plan with: [C, H, W], or [C, T, H, W] (video), or [C, L] (sequence).

    It is the size that the library's model was made for. ``img_size`` replaces its sides and
    ``in_chans`` its channels. The result is None if nothing is known and nothing is given, and then
    the planner finds a size.
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
