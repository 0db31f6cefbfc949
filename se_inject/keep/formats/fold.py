"""Folds the factor of a gate into the layer before it, to the last bit."""

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
    """Turn every gate ``2 * sigmoid`` into a plain sigmoid, in place; outputs stay as they are.

    ``2 * hard_sigmoid`` into ``hard_sigmoid`` too, with every squeeze: doubled maps have doubled
    means, maxima and values.

    Raises:
        NoSiteError: the model has no SE block.
        ExportError: a gate is no multiple of the paper's (``1 + tanh``), or what feeds an SE block
            is no norm, convolution or Linear of its own, or does not feed it alone. Nothing is
            changed then.
    """
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    shared = Counter(
        id(p) for m in model.modules() for p in (*m._parameters.values(), *m._buffers.values())
    )
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
            if layer.gate_scale is None:
                raise ExportError(
                    f"the gate of {block_label(name)}'s SE block is"
                    f" {GATES[layer.gate.name].formulas[layer.init]}, which is no multiple of"
                    f" {layer.gate.name}: there is no factor to fold."
                )
            source = None if producer is None else _last_affine(module.get_submodule(producer))
            if (
                source is None
                or uses[id(source)] > 1
                or any(shared[id(t)] > 1 for t in _affine(source))
            ):
                raise ExportError(
                    f"the SE block of {block_label(name)} scales the output of"
                    f" {producer or 'an operation'}, which is no norm or convolution that feeds it"
                    " alone: the factor 2 of its gate has nowhere to go."
                )
            folds.append((source, layer, layer.gate_scale))
    if not found:
        raise NoSiteError(f"{type(model).__name__} has no SE block; inject_se(model) makes them.")
    with torch.no_grad():
        for source, layer, factor in folds:
            for tensor in _affine(source):
                tensor.mul_(factor)
            layer.fc1.weight.div_(factor)
            layer.to_literal_gate()


def _affine(layer: nn.Module) -> list[Tensor]:
    """Weight and bias: the output is linear in both together."""
    tensors = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return [t for t in tensors if isinstance(t, Tensor)]


def _last_affine(module: nn.Module) -> nn.Module | None:
    """The layer whose weight and bias scale the whole output of ``module``, if there is one."""
    if type(module) is nn.Sequential:
        children = [child for child in module if type(child) is not nn.Identity]
        return _last_affine(children[-1]) if children else None
    plain = type(module) in _affine_layers() and not parametrize.is_parametrized(module)
    ends = [getattr(module, name) for name in ("drop", "act") if hasattr(module, name)]
    if not plain or any(type(end) is not nn.Identity for end in ends):
        return None
    return module if isinstance(getattr(module, "weight", None), Tensor) else None


def _affine_layers() -> set[type[nn.Module]]:
    """Exact classes: timm's ScaledStdConv2d is a Conv2d that takes any scale out of its weight."""
    from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    layers: set[type[nn.Module]] = {*CONVOLUTIONS, nn.Linear, nn.GroupNorm, nn.LayerNorm}
    layers |= {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d}
    return layers | {BatchNormAct2d, LayerNorm, LayerNorm2d}
