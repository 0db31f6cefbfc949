"""The old names of modules, so that files which were pickled under these names still load.

A pickle of an injected model (``torch.save(model)``) names each class and function by its module:
``se_inject.generated.Edit``, ``se_inject.squeeze_excite.SqueezeExcite``, and in the forward of a
block ``se_inject.trace.expect``. Those modules are now split over several rooms. :func:`register`
puts a stand-in for each into ``sys.modules``. The stand-in finds a name in the modules that hold it
today, and imports nothing before it is asked.
"""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

# The old module -> the modules that hold its names today, all inside se_inject.
OLD_PATHS: dict[str, tuple[str, ...]] = {
    "attention": ("layers.attention",),
    "checkpoint": ("keep.save", "keep.load", "keep.header"),
    "export": ("keep.formats.stock", "keep.fold"),
    "generated": ("edit.block_class", "graph.source"),
    "inject": ("api", "edit.insert", "edit.rewrite"),
    "meta": ("graph.meta", "graph.copies"),
    "ops": ("graph.operations.ops", "graph.operations.log"),
    "plan": ("plan.plan", "plan.planner", "edit.site", "reasons"),
    "record": ("graph.recording.call", "graph.recording.record", "graph.example"),
    "scale_add": ("layers.scale_add",),
    "sites": ("reasons", "sites.find"),
    "squeeze_excite": ("layers.squeeze_excite", "layers.layout", "layers.cost"),
    "trace": ("graph.expect", "graph.trace", "graph.facts"),
    "variants": ("layers.variant", "layers.gates", "layers.squeezes"),
}


def register() -> None:
    """Make every old module name importable. ``plan`` and ``sites`` are packages today."""
    for old, homes in OLD_PATHS.items():
        name = f"se_inject.{old}"
        module = sys.modules.get(name)
        if module is None:
            module = types.ModuleType(name, f"Stand-in for old files: see {__name__}.")
            sys.modules[name] = module
        vars(module)["__getattr__"] = _finder(name, homes)


def _finder(name: str, homes: tuple[str, ...]) -> Callable[[str], Any]:
    def find(attribute: str) -> Any:
        if not attribute.startswith("__"):  # tools ask every module for names such as __path__
            for home in homes:
                module = importlib.import_module(f"se_inject.{home}")
                if attribute in vars(module):
                    return vars(module)[attribute]
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

    return find
