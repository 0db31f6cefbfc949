"""``save_se``: the SE tensors and the whole plan in one ``.safetensors`` file."""

import json
import os
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from se_inject.errors import NoSiteError
from se_inject.keep.atomic import atomic_write
from se_inject.keep.fingerprint import COUNTERS, fingerprint, module_hashes, se_keys, tensors_of
from se_inject.keep.header import FORMAT, HEADER_KEY, saved_sites
from se_inject.names import Patterns, few, matching
from se_inject.plan.checks import check_model


def save_se(model: nn.Module, path: str | os.PathLike[str], *, extra: Patterns = None) -> None:
    """Write the SE blocks of ``model`` to one ``.safetensors`` file.

    Args:
        model: an injected model, not wrapped for distributed runs and not sharded.
        path: the file; it is replaced as a whole or not at all, whatever happens on the way.
        extra: what else goes into the file: a glob or globs on ``state_dict`` keys
            (``"head.*"``), or ``"trained"`` for every tensor that can have changed: trainable
            parameters and the statistics of norms. Without it, the file is right only for a base
            whose own tensors have stayed as they were.

    Raises:
        NoSiteError: the model has no SE block.
        ArgumentError: a glob of ``extra`` matches no tensor.
        UnsupportedModelError: the model is wrapped, compiled or sharded.
    """
    check_model(model)
    state = tensors_of(model)
    examples: list[Any] = []
    sites = saved_sites(model, examples)
    if not sites:
        raise NoSiteError(
            f"{type(model).__name__} has no SE block to save; inject_se(model) makes them."
        )
    if lost := [key for key in model.state_dict() if key not in state]:
        warnings.warn(
            f"{few(lost)} comes from get_extra_state and is not saved: safetensors holds the"
            " tensors of modules only.",
            stacklevel=2,
        )
    ours = se_keys(model, state)
    base = [key for key in state if key not in ours]
    kept = _extra(model, base, extra)
    header = {
        "format": FORMAT,
        "version": metadata.version("se-inject"),
        "model": type(model).__name__,
        "sites": [site.to_dict() for site in sites],
        "examples": examples,
        "modules": module_hashes(model),
        "base": {key: fingerprint(key, state[key], hashed=key not in kept) for key in base},
    }
    # The tensors are cloned because safetensors refuses those that share memory.
    tensors = {
        key: state[key].detach().clone(memory_format=torch.contiguous_format)
        for key in (*ours, *kept)
    }
    with atomic_write(Path(path)) as part:
        part.write_bytes(save(tensors, metadata={HEADER_KEY: json.dumps(header)}))


def _extra(model: nn.Module, base: Sequence[str], extra: Patterns) -> set[str]:
    """The keys of the base that go into the file too."""
    if extra is None:
        return set()
    if extra != "trained":
        return matching(base, extra, "extra", "tensor of the base")
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    # Buffers of floating point are statistics (spectral norm's vectors too); those of whole numbers
    # are tables, which never change, or counters.
    names |= {
        name
        for name, b in model.named_buffers(remove_duplicate=False)
        if b.is_floating_point() or name.endswith(COUNTERS)
    }
    return names & set(base)
