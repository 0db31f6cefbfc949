"""Builds the saved network from a file of ``save_se`` and the name of its base."""

from pathlib import Path

from torch import nn

from se_inject.errors import UnknownModelError
from se_inject.keep.header import Header
from se_inject.keep.hub.folder import weights_file
from se_inject.keep.load import load_se
from se_inject.keep.read import read_header
from se_inject.layers.attention import SELayer
from se_inject.models.files import load_weights
from se_inject.models.head import head_name
from se_inject.models.names import load_model


def restore_model(
    name: str,
    weights: Path,
    *,
    checkpoint: Path | None = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    se_layer: SELayer | None = None,
) -> nn.Module:
    """Build the base, give it its weights, and put the saved SE blocks in.

    Args:
        name: the name of the base, as :func:`load_model` takes it.
        weights: a file or folder of :func:`save_se`, or ``hf-hub:user/repo``.
        checkpoint: a file with the base's own weights. Without it, the pretrained weights of the
            library are used if the file of SE blocks does not hold all weights.
        in_chans, num_classes: the input channels and the classes of the base. For timm's models,
            the file knows the number of classes.
        se_layer: the same as for :func:`load_se`.

    Raises:
        CheckpointError: a file is damaged, or was made for another network.
        UnknownModelError: there is no such model, or its pretrained weights cannot be had.
    """
    weights = weights_file(weights)
    header = read_header(weights)
    if num_classes is None:
        num_classes = _num_classes(name, header, in_chans)
    base = load_model(name, in_chans=in_chans, num_classes=num_classes)
    # If the only missing tensors are those that a fresh base has anyway, such as a table of
    # positions, no weights are needed.
    if checkpoint is None and header.differing(base):
        base = _pretrained(name, in_chans, num_classes)
    if checkpoint is not None:
        load_weights(base, checkpoint)
    load_se(base, weights, se_layer=se_layer)
    base.eval()
    return base


def _pretrained(name: str, in_chans: int | None, num_classes: int | None) -> nn.Module:
    try:
        return load_model(name, in_chans=in_chans, num_classes=num_classes, pretrained=True)
    except UnknownModelError as error:
        raise UnknownModelError(
            f"{error}\nThe file has not all weights of the base: give them with --checkpoint FILE."
        ) from error


def _num_classes(name: str, header: Header, in_chans: int | None) -> int | None:
    """The number of outputs that the classifier of a timm model has according to the file."""
    classifier = head_name(load_model(name, in_chans=in_chans, meta=True))
    entry = header.base.get(f"{classifier}.weight")
    return int(entry[1][0]) if entry else None
