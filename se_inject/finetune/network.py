"""The network of a run: its base with weights, a head for the classes of the data, SE blocks."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from se_inject.edit.block_class import edit_of
from se_inject.errors import ForeignFileError, TrainingError, UnknownModelError
from se_inject.finetune.settings import Settings
from se_inject.keep.read import read_header
from se_inject.keep.restore import restore_model
from se_inject.models import head
from se_inject.models.files import load_weights
from se_inject.models.names import load_model
from se_inject.report.count import count_model


def base_of(settings: Settings) -> tuple[nn.Module, dict[str, Any]]:
    """The network with its weights, and how timm prepares images for it."""
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint)
    if checkpoint is not None and _is_se_file(checkpoint):
        network = restore_model(settings.model, checkpoint, se_layer=settings.se_layer)
    else:
        pretrained = settings.pretrained and checkpoint is None
        try:
            network = load_model(settings.model, pretrained=pretrained)
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
    """The classifier.

    Raises:
        TrainingError: the network has none.
    """
    found = head.head_of(network)
    if found is None:
        raise TrainingError(f"{type(network).__name__} has no Linear that could be its classifier.")
    return found


def with_head(network: nn.Module, classes: int) -> nn.Module:
    """A new classifier, unless the network has one for as many classes."""
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
    """Names of the blocks that have SE."""
    return [name for name, module in network.named_modules() if edit_of(module)]


def size_of(network: nn.Module, example: torch.Tensor) -> tuple[int, int | None]:
    """Parameters, and multiply-accumulates for one image; None where they cannot be counted."""
    count = count_model(network, ((example.to("meta"),), {}))
    return count.params, count.macs
