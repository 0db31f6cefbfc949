"""The arguments with which a forward is recorded: the user's example, or usual inputs."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.graph.containers import tensors_in
from se_inject.graph.recording.call import Arguments
from se_inject.layers.layout import first_convolution, kind_of
from se_inject.torch_private import pytree


def example_inputs(model: nn.Module, example_input: Any = None) -> list[Arguments]:
    """The (args, kwargs) to try in turn, on meta: the user's, or some that fit most networks."""
    dtype = floating_dtype(model)
    if example_input is not None:
        on_meta = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), example_input)
        if isinstance(on_meta, Mapping):
            return [((), dict(on_meta))]
        return [(on_meta if isinstance(on_meta, tuple) else (on_meta,), {})]
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    first_conv = first_convolution(model)
    spaces = (tuple(size[1:]),) if size else kind_of(first_conv).spaces
    channels = [size[0] if size else 3]
    if first_conv is not None and first_conv.in_channels not in channels:
        channels.append(first_conv.in_channels)
    # The batch has two images, so that a batch norm in train mode has more than one value for a 1x1
    # map. The forward gets as many such arguments as it requires (optical flow takes two frames).
    return [
        ((torch.empty(2, c, *space, dtype=dtype, device="meta"),) * _required_arguments(model), {})
        for space in spaces
        for c in channels
    ]


def is_batched(example: Arguments) -> bool:
    """Whether dim 0 of the tensors is the batch. A detector takes a list of single images."""
    args, kwargs = example
    first = next(iter((*args, *kwargs.values())), None)
    return not isinstance(first, list | tuple)


def batch_size(example: Arguments) -> int:
    """How many images (or clips, or sequences) the first tensor holds."""
    tensors = tensors_in(example)
    return tensors[0].shape[0] if tensors and tensors[0].dim() and is_batched(example) else 1


def item_size(example: Arguments) -> list[int]:
    """The size of one image in the first tensor, such as [C, H, W]."""
    tensors = tensors_in(example)
    return list(tensors[0].shape[1 if is_batched(example) else 0 :]) if tensors else []


def _required_arguments(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the weights, which is most probably the dtype of the input too."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
