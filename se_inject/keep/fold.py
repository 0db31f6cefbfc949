"""Folds the factor of a gate into the layer before the SE block, to the last bit.

The factor 2 of a gate ``2 * sigmoid`` is only a parametrisation. If the layer that feeds the SE
block is doubled, the SE block sees doubled means. If ``fc1`` is halved at the same time,
``x * 2 sigmoid(f(x))`` is ``2x * sigmoid(f(2x / 2))``. Doubling and halving are exact in floating
point, so the outputs stay equal to the last bit.
"""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from se_inject.edit.block_class import edit_of
from se_inject.errors import ExportError, NoSiteError
from se_inject.layers.gates import GATES
from se_inject.layers.layout import CONVOLUTIONS
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.names import block_label


def fold_gates(model: nn.Module) -> None:
    """Turn every gate ``2 * sigmoid`` into a plain sigmoid, in place. The outputs stay the same.

    A gate ``2 * hard_sigmoid`` becomes ``hard_sigmoid`` in the same way. This works with every
    squeeze, because a doubled map has doubled means, doubled maxima and doubled values.

    Raises:
        NoSiteError: the model has no SE block.
        ExportError: a gate is not a multiple of the paper's gate (such as ``1 + tanh``), an SE
            block adds a shift, or it reads something other than a norm, convolution or Linear that
            feeds it alone. Nothing is changed then.
    """
    producers = Producers(model)
    folds: list[tuple[nn.Module, SqueezeExcite, float]] = []
    found = False
    for name, module in model.named_modules():
        if (edit := edit_of(module)) is None:
            continue
        for child, producer in zip(edit.children, edit.producers, strict=True):
            found = True
            layer = getattr(module, child)
            if not isinstance(layer, SqueezeExcite) or layer.gate_scale == 1.0:
                continue
            if layer.shift:
                raise ExportError(
                    f"{block_label(name)}'s SE block adds a shift behind its gate, which no stock"
                    " SE block does: its gate is not folded."
                )
            if layer.gate_scale is None:
                raise ExportError(
                    f"the gate of {block_label(name)}'s SE block is"
                    f" {GATES[layer.gate.name].formulas[layer.init]}, which is no multiple of"
                    f" {layer.gate.name}: there is no factor to fold."
                )
            source = producers.of(module, producer)
            if source is None:
                raise ExportError(
                    f"the SE block of {block_label(name)} scales the output of"
                    f" {producer or 'an operation'}, which is no norm or convolution that feeds it"
                    " alone: the factor 2 of its gate has nowhere to go."
                )
            folds.append((source, layer, layer.gate_scale))
    if not found:
        raise NoSiteError(f"{type(model).__name__} has no SE block; inject_se(model) makes them.")
    for source, layer, factor in folds:
        fold_factor(source, layer, factor)


def fold_factor(source: nn.Module, layer: SqueezeExcite, factor: float) -> None:
    """Move the factor of a gate into the layer that feeds the SE block, in place."""
    with torch.no_grad():
        for tensor in affine(source):
            tensor.mul_(factor)
        layer.fc1.weight.div_(factor)
        layer.to_literal_gate()


class Producers:
    """The layers of a model that only feed SE blocks, and whose weights can take a factor."""

    def __init__(self, model: nn.Module) -> None:
        modules = model.named_modules(remove_duplicate=False)
        self._uses = Counter(id(module) for _, module in modules)
        self._shared = Counter(
            id(p) for m in model.modules() for p in (*m._parameters.values(), *m._buffers.values())
        )

    def of(self, block: nn.Module, producer: str | None) -> nn.Module | None:
        """The norm, convolution or Linear that ends a block's producer (see ``Edit.producers``).

        It is None if there is no such layer, or if others use it or its weights too.
        """
        source = None if producer is None else last_affine(block.get_submodule(producer))
        if source is None or self._uses[id(source)] > 1:
            return None
        return None if any(self._shared[id(t)] > 1 for t in affine(source)) else source

    def has_alone(self, module: nn.Module) -> bool:
        """Whether a module is at one place only in the model and shares its tensors with none."""
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return self._uses[id(module)] == 1 and all(self._shared[id(t)] == 1 for t in tensors)


def affine(layer: nn.Module) -> list[Tensor]:
    """The weight and bias of a layer. Its output is linear in both together."""
    tensors = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return [t for t in tensors if isinstance(t, Tensor)]


def scales_channels(source: nn.Module, layer: SqueezeExcite) -> bool:
    """Whether dim 0 of the source's weight belongs to the channels that the SE block scales."""
    from timm.layers import LayerNorm2d

    if affine(source)[0].shape[0] != layer.channels:
        return False
    last = isinstance(source, nn.Linear | nn.LayerNorm) and not isinstance(source, LayerNorm2d)
    return last == (-1 not in layer.space)


def last_affine(module: nn.Module) -> nn.Module | None:
    """The layer whose weight and bias scale the whole output of ``module``, if there is one."""
    if type(module) is nn.Sequential:
        children = [child for child in module if type(child) is not nn.Identity]
        return last_affine(children[-1]) if children else None
    plain = type(module) in _affine_layers() and not parametrize.is_parametrized(module)
    ends = [getattr(module, name) for name in ("drop", "act") if hasattr(module, name)]
    if not plain or any(type(end) is not nn.Identity for end in ends):
        return None
    return module if isinstance(getattr(module, "weight", None), Tensor) else None


def _affine_layers() -> set[type[nn.Module]]:
    """The classes of layers with such a weight and bias.

    Subclasses do not count: timm's ScaledStdConv2d is a Conv2d that removes any scale from its
    weight again.
    """
    from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    layers: set[type[nn.Module]] = {*CONVOLUTIONS, nn.Linear, nn.GroupNorm, nn.LayerNorm}
    layers |= {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d}
    return layers | {BatchNormAct2d, LayerNorm, LayerNorm2d}
