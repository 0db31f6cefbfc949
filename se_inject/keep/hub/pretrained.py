"""``from_pretrained`` builds the whole network from a shared folder."""

import os
from pathlib import Path

from torch import nn

from se_inject.errors import CheckpointError
from se_inject.keep.hub.folder import read_config, weights_file
from se_inject.keep.restore import restore_model
from se_inject.layers.attention import SELayer


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    se_layer: SELayer | None = None,
) -> nn.Module:
    """Build the network of a folder that :func:`save_se` wrote, in eval mode.

    The base is built by its name in ``config.json``. If the folder does not hold all weights of the
    base, they are taken from the library of the base. No code of the folder runs, and no module
    that it names is imported.

    Args:
        source: ``"hf-hub:user/repo"``, ``"hf-hub:user/repo@revision"``, or a folder.
        checkpoint: a file with the base's own weights. They replace those of its library.
        se_layer: the same as for :func:`load_se`.

    Raises:
        CheckpointError: the folder is damaged or does not name its base, or the Hub has no such
            repository.
        UnknownModelError: the library has no such base, or its weights cannot be had.
    """
    said = read_config(source)
    if said.base is None or ":" in said.base:
        names = "does not say" if said.base is None else f"says {said.base!r} of"
        raise CheckpointError(
            f"{os.fspath(source)} {names} its base, which only you can build:"
            " load_se(base, source) puts its SE blocks in."
        )
    return restore_model(
        said.base,
        weights_file(source),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        in_chans=said.in_chans,
        se_layer=se_layer,
    )
