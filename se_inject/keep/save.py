"""``save_se`` writes the SE tensors and the whole plan to a ``.safetensors`` file or a folder."""

import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from se_inject.edit.insert import is_injected
from se_inject.errors import ArgumentError, NoSiteError, warn
from se_inject.keep.atomic import atomic_write
from se_inject.keep.fingerprint import COUNTERS, fingerprint, module_hashes, se_keys, tensors_of
from se_inject.keep.header import HEADER_KEY, format_of, saved_sites
from se_inject.keep.hub.about import about
from se_inject.keep.hub.folder import names_a_folder, write_folder
from se_inject.names import Patterns, few, matching
from se_inject.plan.checks import check_model


def save_se(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    extra: Patterns = None,
    base: str | None = None,
    run: str | os.PathLike[str] | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Write the SE blocks of ``model`` to one ``.safetensors`` file, or to a folder to share.

    A folder gets three files: the SE blocks in ``se.safetensors``, a ``config.json`` that names the
    base, and a model card ``README.md``. A card that somebody has edited stays as it is.
    :func:`from_pretrained` and :func:`load_se` read the folder, from the disk or from the Hugging
    Face Hub.

    Args:
        model: an injected model. It must not be sharded or wrapped for distributed runs.
        path: the file to write. It is replaced as a whole or not at all, whatever happens on the
            way. A path that ends in a slash (``"folder/"``) is a folder.
        extra: which other tensors go into the file. It is one glob or several globs on
            ``state_dict`` keys (``"head.*"``), or ``"trained"`` for every tensor that can have
            changed: trainable parameters and the statistics of norms. Without ``extra``, the file
            fits only a base whose own tensors have stayed as they were.
        base: the name of the base, such as ``"torchvision/resnet50"``. A model of timm knows its
            own name.
        run: the folder of the fine-tuning run that made the model. The card then has the data and
            the accuracies, and ``config.json`` has the classes.
        license: the licence of the weights, such as ``"apache-2.0"``. The default is the licence of
            timm's base weights.
        push_to_hub: a repository on the Hub, ``"user/repo"``, to which the folder is uploaded. It
            is created if it does not exist. If it has a card already, that card stays.

    Raises:
        NoSiteError: the model has no SE block.
        ArgumentError: a glob of ``extra`` matches no tensor, the path cannot be written, or an
            option for folders is given with a file.
        UnsupportedModelError: the model is wrapped, compiled or sharded.
        CheckpointError: ``run`` is not the folder of a finished run.
        ExportError: the Hub does not take the folder. It is written on the disk all the same.
    """
    if not names_a_folder(path):
        options = {"base": base, "run": run, "license": license, "push_to_hub": push_to_hub}
        if given := [name for name, value in options.items() if value is not None]:
            raise ArgumentError(
                f"{', '.join(given)} is of a folder, and {os.fspath(path)!r} is a file: end it in"
                " a slash."
            )
        _write_file(model, Path(path), extra)
        return
    check_model(model)
    _check_injected(model)
    said = about(model, base, None if run is None else Path(run), license)
    write_folder(Path(path), said, lambda file: _write_file(model, file, extra), repo=push_to_hub)


def _check_injected(model: nn.Module) -> None:
    if not is_injected(model):
        raise NoSiteError(
            f"{type(model).__name__} has no SE block to save; inject_se(model) makes them."
        )


def _write_file(model: nn.Module, path: Path, extra: Patterns) -> None:
    check_model(model)
    _check_injected(model)
    state = tensors_of(model)
    examples: list[Any] = []
    sites = saved_sites(model, examples)
    if lost := [key for key in model.state_dict() if key not in state]:
        warn(
            f"{few(lost)} comes from get_extra_state and is not saved: safetensors holds the"
            " tensors of modules only."
        )
    ours = se_keys(model, state)
    base = [key for key in state if key not in ours]
    kept = _extra(model, base, extra)
    header = {
        "format": format_of(sites),
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
    with atomic_write(path) as part:
        part.write_bytes(save(tensors, metadata={HEADER_KEY: json.dumps(header)}))


def _extra(model: nn.Module, base: Sequence[str], extra: Patterns) -> set[str]:
    """The keys of the base whose tensors go into the file too."""
    if extra is None:
        return set()
    if extra != "trained":
        return matching(base, extra, "extra", "tensor of the base")
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    # Buffers of floating-point numbers are statistics (spectral norm's vectors too). Buffers of
    # whole numbers are counters, or tables that never change.
    names |= {
        name
        for name, b in model.named_buffers(remove_duplicate=False)
        if b.is_floating_point() or name.endswith(COUNTERS)
    }
    return names & set(base)
