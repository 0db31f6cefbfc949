"""Injected models of transformers: ``from_pretrained`` brings their SE blocks back.

``save_pretrained`` and the Trainer write all tensors of an injected model, and ``config.json``
builds its class, which knows no SE blocks. ``remember_se`` writes what was injected into the
configuration, and ``from_pretrained`` of this module injects it before the tensors are loaded::

    from se_inject.transformers import from_pretrained, remember_se

    model = remember_se(inject_se(ResNetForImageClassification.from_pretrained(NAME)))
    Trainer(model, ...).train()
    model = from_pretrained(ResNetForImageClassification, "output/checkpoint-500")
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from se_inject.api import inject_se
from se_inject.edit.insert import injected
from se_inject.errors import ArgumentError, CheckpointError
from se_inject.keep.beside import described, repeat
from se_inject.layers.attention import SELayer
from se_inject.names import few

_KEY = "se_inject"  # of the configuration


def remember_se(model: nn.Module) -> nn.Module:
    """Write what was injected into ``model.config``, and return the model.

    Every ``config.json`` that is written of the model from then on has it under ``se_inject``.

    Raises:
        NoSiteError: the model has no SE block.
        ArgumentError: the model has no configuration; it is none of transformers.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise ArgumentError(
            f"{type(model).__name__} has no configuration of transformers to write into."
        )
    setattr(config, _KEY, described(model))
    return model


def from_pretrained(
    kind: Any,
    source: str | os.PathLike[str],
    *args: Any,
    injection: Mapping[str, Any] | None = None,
    se_layer: SELayer | None = None,
    **kwargs: Any,
) -> Any:
    """``kind.from_pretrained(source, ...)`` with the SE blocks that the saved model had.

    Args:
        kind: the class of the model, or an Auto class such as AutoModelForImageClassification.
        source: a folder, or a repository of the Hub.
        injection: the options of ``inject_se``, for a model that was saved without
            :func:`remember_se`.
        se_layer: what the model was injected with, if it was.
        args, kwargs: what ``kind.from_pretrained`` takes.

    Raises:
        CheckpointError: the configuration does not say what was injected, or says something else
            than the tensors.
    """
    from transformers import AutoConfig

    shared = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(
        source, **{name: kwargs[name] for name in shared if name in kwargs}
    )
    plan = getattr(config, _KEY, None)
    if plan is None and injection is None:
        raise CheckpointError(
            f"{source} does not say what was injected: call remember_se(model) before saving, or"
            " pass injection={'r': 16, ...} as to inject_se."
        )
    for name in [name for name in kwargs if hasattr(config, name)]:  # such as num_labels
        setattr(config, name, kwargs.pop(name))
    if hasattr(kind, "from_config"):  # an Auto class
        with torch.device("meta"):
            kind = type(kind.from_config(config))

    def init(self: Any, *given: Any, **named: Any) -> None:
        kind.__init__(self, *given, **named)
        if injection is None:
            repeat(self, plan, f"{source}: config.json", se_layer)
        else:
            inject_se(self, **{"se_layer": se_layer, **injection})

    # transformers builds the model, and only then reads tensors into what it built.
    building: Any = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
    said_more = kwargs.pop("output_loading_info", False)
    model, said = building.from_pretrained(
        source, *args, config=config, output_loading_info=True, **kwargs
    )
    model.__class__ = kind
    ours = tuple(f"{name}.{child}." for name, _, edit in injected(model) for child in edit.children)
    if missing := sorted(key for key in said["missing_keys"] if key.startswith(ours)):
        raise CheckpointError(f"{source} has no tensors of SE blocks: {few(missing)}.")
    return (model, said) if said_more else model
