"""Weights of a whole network from a file."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from se_inject.errors import CheckpointError, first_line


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a whole ``state_dict`` from a ``.safetensors`` or a torch file; code is never run.

    Raises:
        CheckpointError: the file is damaged or holds other things, or does not fit the model.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.") from None
    except Exception as error:  # of two formats, many kinds
        raise CheckpointError(
            f"{path}: no weights that can be read without running code ({first_line(error)})."
        ) from error
    for key in ("state_dict", "model"):  # as training scripts nest them
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {' '.join(lines[1:2] or lines)[:200]}"
        ) from error
