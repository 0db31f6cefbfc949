"""Squeeze-and-Excitation for a network you already have.

    model ──graph──▶ block graphs ──sites──▶ residual sites ──plan──▶ Plan ──edit──▶ model
                                                                │
                                                                └─report──▶ table, JSON

``inject_se(model)`` puts an SE block on every residual branch of a timm, torchvision or
hand-written CNN, and leaves everything else alone: the same object, the same checkpoint keys,
the same outputs to the last bit, until training moves the new weights.

    reasons, errors, names   why an addition is skipped; the one family of errors; block names
    layers/      what is inserted: the SE block, its variants, what one costs
    graph/       model + example input -> one torch.fx graph per block, facts on its nodes
    sites/       block graph -> where a block can go; reads only
    edit/        site -> edited block; the only room that changes a graph or a class
    plan/        which sites get what: r, include/exclude; what is skipped and why
    api          inject_se, remove_se, se_parameters, set_plain_ops
    models/      "resnet50", "torchvision/resnet50", "my_pkg.nets:build" -> nn.Module
    keep/        save_se, load_se; optimize_for_inference; export to timm, torch.export, ONNX
    gates/       what the gates do: record, statistics, pictures, folding the constant ones
    report/      parameters, MACs and latency; tables, JSON; the zoo's coverage
    finetune/    settings, data, recipe, trainer, results; imported by its commands only
    cli/         Typer: parse, call, print

Each room imports only rooms that stand above it in this list.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from se_inject.api import inject_se, remove_se, se_parameters, set_plain_ops
from se_inject.edit.site import Site
from se_inject.errors import (
    ArgumentError,
    BenchmarkError,
    CheckpointError,
    DataError,
    ExportError,
    ForwardError,
    NoSiteError,
    SEInjectError,
    TrainingError,
    UnknownModelError,
    UnsupportedModelError,
)
from se_inject.layers.identity_start import IdentityStart
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.variant import Variant
from se_inject.old_paths import register
from se_inject.plan.plan import Plan
from se_inject.plan.planner import plan_se
from se_inject.reasons import Skipped

if TYPE_CHECKING:
    from se_inject.keep.deploy.optimize import optimize_for_inference
    from se_inject.keep.formats.stock import to_stock
    from se_inject.keep.hub.pretrained import from_pretrained
    from se_inject.keep.load import load_se
    from se_inject.keep.save import save_se

register()  # old pickles name modules that do not exist any more

__version__ = metadata.version("se-inject")

# Few programs read or write files, so these names are imported when they are first used.
_LATER = {
    "from_pretrained": "se_inject.keep.hub.pretrained",
    "load_se": "se_inject.keep.load",
    "optimize_for_inference": "se_inject.keep.deploy.optimize",
    "save_se": "se_inject.keep.save",
    "to_stock": "se_inject.keep.formats.stock",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ArgumentError",
    "BenchmarkError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "ForwardError",
    "IdentityStart",
    "NoSiteError",
    "Plan",
    "SEInjectError",
    "Site",
    "Skipped",
    "SqueezeExcite",
    "TrainingError",
    "UnknownModelError",
    "UnsupportedModelError",
    "Variant",
    "from_pretrained",
    "inject_se",
    "load_se",
    "optimize_for_inference",
    "plan_se",
    "remove_se",
    "save_se",
    "se_parameters",
    "set_plain_ops",
    "to_stock",
]
