"""The network of a run: its base with weights, its head for the classes, and its SE blocks."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from se_inject.edit.block_class import edit_of
from se_inject.errors import ArgumentError, ForeignFileError, TrainingError, UnknownModelError
from se_inject.finetune.options.settings import Settings
from se_inject.keep.read import read_header
from se_inject.keep.restore import restore_model
from se_inject.models import head
from se_inject.models.files import load_weights
from se_inject.models.names import load_model
from se_inject.report.count import count_model


def base_of(settings: Settings) -> tuple[nn.Module, dict[str, Any]]:
    """Build the base with its weights. The dictionary says how timm prepares images for it."""
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint)
    if checkpoint is not None and _is_se_file(checkpoint):
        if settings.drop_path is not None:
            raise ArgumentError(
                "--drop-path cannot be combined with a --checkpoint that save_se wrote."
            )
        network = restore_model(settings.model, checkpoint, se_layer=settings.se_layer)
    else:
        pretrained = settings.pretrained and checkpoint is None
        try:
            network = load_model(
                settings.model, pretrained=pretrained, drop_path=settings.drop_path
            )
        except UnknownModelError as error:
            if not pretrained:
                raise
            raise UnknownModelError(
                f"{error}\nGive weights with --checkpoint FILE, or begin with --no-pretrained."
            ) from error
        if checkpoint is not None:
            load_weights(network, checkpoint)
    return network, timm.data.resolve_model_data_config(network)


def _is_se_file(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        read_header(path)
    except ForeignFileError:
        return False
    return True


def head_of(network: nn.Module) -> nn.Module:
    """The classifier of a network.

    Raises:
        TrainingError: the network has no classifier.
    """
    found = head.head_of(network)
    if found is None:
        raise TrainingError(f"{type(network).__name__} has no Linear that could be its classifier.")
    return found


def with_head(network: nn.Module, classes: int) -> nn.Module:
    """Give the network a new classifier, unless it has one for this number of classes already.

    Raises:
        TrainingError: the network has no classifier, or one that cannot be replaced.
    """
    old = head_of(network)
    if classes == head.num_classes_of(network):
        return network
    of_timm: Any = getattr(network, "reset_classifier", None)
    if of_timm is not None:
        of_timm(classes)
        return network
    if not isinstance(old, nn.Linear):
        raise TrainingError(f"{type(network).__name__} has a head that cannot be replaced.")
    new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    for name, module in network.named_modules():
        for child, value in module.named_children():
            if value is old:
                setattr(network.get_submodule(name), child, new)
    return network


def blocks_of(network: nn.Module) -> list[str]:
    """The names of the blocks that have SE."""
    return [name for name, module in network.named_modules() if edit_of(module)]


def size_of(network: nn.Module, example: torch.Tensor) -> tuple[int, int | None]:
    """The number of parameters, and of multiply-accumulates for one image.

    The second number is None if it cannot be counted.
    """
    count = count_model(network, ((example.to("meta"),), {}))
    return count.params, count.macs


def zero_branches(network: nn.Module, example: torch.Tensor) -> list[str]:
    """The names of the blocks whose SE layers get a gradient of exactly 0, and so learn nothing.

    A ResNet of timm with random weights has a scale of zero in the last norm of each branch. While
    its base is frozen, the branches stay zero, and so do the gradients of their SE blocks.
    """
    blocks = {
        name: [
            p
            for child in edit.children
            for p in module.get_submodule(child).parameters()
            if p.requires_grad
        ]
        for name, module in network.named_modules()
        if (edit := edit_of(module))
    }
    parameters = [p for own in blocks.values() for p in own]
    modes = [(module, module.training) for module in network.modules()]
    generator = torch.Generator().manual_seed(0)
    try:
        scores = network.eval()(torch.randn(example.shape, generator=generator))
        aim = (scores * torch.randn(scores.shape, generator=generator)).sum()
        found = torch.autograd.grad(aim, parameters, allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
    moved = {id(p) for p, g in zip(parameters, found, strict=True) if g is not None and g.any()}
    return [name for name, own in blocks.items() if own and not any(id(p) in moved for p in own)]
