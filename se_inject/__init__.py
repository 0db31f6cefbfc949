"""Squeeze-and-Excitation for a network you already have.

    model ──trace──▶ block graphs ──sites──▶ residual sites ──plan──▶ Plan ──inject──▶ model
                                                                │
                                                                └─cost──▶ report (table, JSON)

``inject_se(model)`` puts an SE block on every residual branch of a timm, torchvision or
hand-written CNN, and leaves everything else alone: the same object, the same checkpoint keys,
the same outputs to the last bit, until training moves the new weights.

    errors.py           the one family of errors
    variants.py         the paper's gates, squeezes and placements: one table
    scale_add.py        the sum that an SE block ends in, in one pass
    squeeze_excite.py   the SE block: the only new nn.Module, and what one costs
    attention.py        other attention of timm by its name, in place of SE
    ops.py              what torch functions do to feature maps
    meta.py             a model on meta tensors, and its forward there
    record.py           model + example input -> how its modules are called
    trace.py            recorded calls -> one torch.fx graph per block, shapes on its nodes
    sites.py            block graph -> residual sites; reads only
    checks.py           arguments and models that are refused
    plan.py             which sites get what: r, include/exclude; what is skipped and why
    inject.py           Plan -> edited model; remove_se. The only file that changes a graph
    generated.py        forwards made from graphs, and the block classes that carry them
    files.py            files that are whole or not there
    checkpoint.py       save_se, load_se: the added weights in one small file
    export.py           to_stock, torch.export, ONNX: networks that need no se_inject
    cost.py             parameters and MACs of the whole network
    benchmark.py        the latency of a forward, before and after
    report.py           Plan + cost -> rich table, JSON
    models.py           "resnet50", "torchvision/resnet50", "my_pkg.nets:build" -> nn.Module
    restore.py          MODEL and a file of save_se -> the network that was saved
    finetune/           data, recipe, runs; imported by its commands only
    zoo.py              every model of timm and torchvision -> what can be injected
    options.py          the options that several commands have
    cli.py              Typer: parse, call, print
"""

from importlib import metadata

from se_inject.api import inject_se, remove_se, se_parameters
from se_inject.edit.site import Site
from se_inject.errors import (
    ArgumentError,
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
from se_inject.keep.formats.stock import to_stock
from se_inject.keep.load import load_se
from se_inject.keep.save import save_se
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.variant import Variant
from se_inject.old_paths import register
from se_inject.plan.plan import Plan
from se_inject.plan.planner import plan_se
from se_inject.reasons import Skipped

register()  # pickles from before the rooms name modules that are not there any more

__version__ = metadata.version("se-inject")

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "ForwardError",
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
    "inject_se",
    "load_se",
    "plan_se",
    "remove_se",
    "save_se",
    "se_parameters",
    "to_stock",
]
