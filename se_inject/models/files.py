"""Loads the weights of a whole network from a file."""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from se_inject.errors import CheckpointError, first_line


def _plain_name(key: Any) -> Any:
    return key.removeprefix("module.").removeprefix("_orig_mod.") if isinstance(key, str) else key


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a whole ``state_dict`` from a ``.safetensors`` file or a torch file.

    Code in the file is never run.

    Raises:
        CheckpointError: the file is damaged, holds something else, or does not fit the model.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # timm's train.py keeps its arguments beside the weights; a Namespace runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.") from None
    except Exception as error:  # the two formats raise many kinds of errors
        raise CheckpointError(
            f"{path} has no weights that can be read without running code ({first_line(error)})."
        ) from error
    # Training scripts nest the weights under these keys. timm's averaged weights come first,
    # because they are the ones that it validated.
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if isinstance(state, dict):  # the network may have been compiled or trained in parallel
        state = {_plain_name(key): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {' '.join(lines[1:2] or lines)[:200]}"
        ) from error
