"""MODEL and a file of ``save_se`` -> the network that was saved."""

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
        name: of the base, as :func:`load_model` takes it.
        weights: a file or folder of :func:`save_se`, or ``hf-hub:user/repo``.
        checkpoint: the base's own weights. Without it, the pretrained weights of the library are
            taken where the file does not hold all weights.
        in_chans, num_classes: those of the base; for timm's models, the file knows the number of
            classes.
        se_layer: as in :func:`load_se`.

    Raises:
        CheckpointError: a file is damaged, or made for another network.
        UnknownModelError: no such model, or its pretrained weights cannot be had.
    """
    weights = weights_file(weights)
    header = read_header(weights)
    if num_classes is None:
        num_classes = _num_classes(name, header, in_chans)
    base = load_model(name, in_chans=in_chans, num_classes=num_classes)
    # What a fresh base has already, such as a table of positions, needs no weights.
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
    """The number of outputs that the classifier of a timm model has in the file."""
    classifier = head_name(load_model(name, in_chans=in_chans, meta=True))
    entry = header.base.get(f"{classifier}.weight")
    return int(entry[1][0]) if entry else None
