"""Folds gates that cannot depend on the image, and factors of gates, into the layers before them.

If all weights of ``fc2`` are 0, it returns its bias for every image. The gate is then a constant c,
and the norm before it can give ``x * c`` at once: its weight and bias are multiplied by c. This
holds for every image. ``se_inject.gates.fold_se`` is for gates that are constant on the images of
one data set only.
"""

import torch
from torch import Tensor, nn

from se_inject.edit.block_class import Edit
from se_inject.edit.insert import injected, restore
from se_inject.keep.deploy.norms import is_touched
from se_inject.keep.fold import Producers, affine, fold_factor, scales_channels
from se_inject.layers.squeeze_excite import SqueezeExcite


def fold_constant_gates(model: nn.Module) -> list[str]:
    """Take out SE blocks with a constant gate, in place, and return the names of their blocks."""
    producers = Producers(model)
    found: dict[str, list[tuple[nn.Module, Tensor]]] = {}
    for name, block, edit in injected(model):
        scaled = _constants(block, edit, producers)
        if scaled is not None and type(block) is edit.block_class:
            found[name] = scaled
    if found:
        restore(model, found)
    with torch.no_grad():
        for scaled in found.values():
            for source, constant in scaled:
                for tensor in affine(source):
                    tensor.mul_(constant.reshape(-1, *(1,) * (tensor.dim() - 1)))
    return list(found)


def fold_factors(model: nn.Module) -> list[str]:
    """Fold the factor 2 of gates into layers that can take it, in place.

    Returns:
        the names of the SE blocks whose factor was folded.
    """
    producers = Producers(model)
    folded = []
    for name, block, edit in injected(model):
        for child, producer in zip(edit.children, edit.producers, strict=True):
            layer = plain_se(block, child)
            factor = None if layer is None else layer.gate_scale
            source = _source(producers, block, producer)
            if layer is None or factor is None or factor == 1.0:
                continue
            if source is not None:
                fold_factor(source, layer, factor)
                folded.append(f"{name}.{child}".lstrip("."))
    return folded


def _constants(
    block: nn.Module, edit: Edit, producers: Producers
) -> list[tuple[nn.Module, Tensor]] | None:
    """The layers that will take the constants of a block's gates. A gate of 1 needs no layer.

    None means that the block keeps its SE blocks.
    """
    scaled = []
    for child, producer in zip(edit.children, edit.producers, strict=True):
        layer = plain_se(block, child)
        if layer is None or layer.fc2.weight.any():
            return None
        bias = layer.fc2.bias
        constant = layer.gate(layer.fc2.weight.new_zeros(layer.channels) if bias is None else bias)
        if (constant == 1).all():
            continue
        source = _source(producers, block, producer)
        if source is None or not scales_channels(source, layer):
            return None
        scaled.append((source, constant))
    return scaled


def _source(producers: Producers, block: nn.Module, producer: str | None) -> nn.Module | None:
    """The layer that can take a constant, if nobody watches it or a module that contains it."""
    if producer is None or any(map(is_touched, block.get_submodule(producer).modules())):
        return None
    return producers.of(block, producer)


def plain_se(block: nn.Module, child: str) -> SqueezeExcite | None:
    """The child, if it is an SE block of this package that nobody watches and nobody changed."""
    layer = block.get_submodule(child)
    if type(layer) is SqueezeExcite and not any(map(is_touched, layer.modules())):
        return layer
    return None
