"""Shows the forward of one block as Python code, before and after the injection."""

import re

from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.text import Text
from torch import fx

from se_inject.edit.around import source_around
from se_inject.edit.rewrite import edit_graph
from se_inject.errors import ArgumentError
from se_inject.names import near_names
from se_inject.plan.plan import Plan
from se_inject.plan.table import MODEL_ITSELF


def block_code(plan: Plan, block: str) -> RenderableType:
    """The forward of one block as Python, before and after the injection.

    If the forward reads ``self.training``, both modes are shown.

    Raises:
        ArgumentError: the plan has no site in a block of that name.
    """
    block = "" if block == MODEL_ITSELF else block
    sites = [site for site in plan.sites if site.block == block]
    if not sites:
        reasons = [s.reason for s in plan.skipped if s.block == block]
        why = f": {reasons[0]}" if reasons else ""
        near = near_names(block, [site.block or MODEL_ITSELF for site in plan.sites])
        raise ArgumentError(f"block {block!r} gets no SE block{why}. Blocks that do: {near}.")
    children = tuple(site.child for site in sites)
    kind = type(plan.model.get_submodule(block)).__name__
    label = f"{block or MODEL_ITSELF}{' (unit)' if sites[0].kind == 'unit' else ''}"
    traced = plan.blocks[block]
    modes = {"": (traced.eval, 0)}
    if traced.train is not traced.eval:
        modes = {" in eval mode": (traced.eval, 0), " in train mode": (traced.train, 1)}
    parts: list[RenderableType] = []
    for mode, (forward, index) in modes.items():
        where = [site.where[index] for site in sites]
        around = source_around(forward, sites, kind)
        after = edit_graph(forward.graph, where, children, fuse=plan.se_layer is None)
        parts += [
            Text(f"{label}: {kind}.forward before{mode}", style="bold"),
            _python(_source(forward.graph)),
            Text(f"\n{label}: SE{kind}.forward after{mode}", style="bold"),
            _python(around.text if around else _source(after)),
        ]
    return Group(*parts)


def _python(code: str) -> Syntax:
    return Syntax(code, "python", theme="ansi_dark", background_color="default", word_wrap=True)


def _source(graph: fx.Graph) -> str:
    """The code of a graph, without the checks of flags and without fx's notes on freed values."""
    lines = graph.python_code("self").src.splitlines()
    shown = (line for line in lines if line.strip() and "_expect(" not in line)
    return "\n".join(re.sub(r";  (\w+ = )+None$", "", line) for line in shown)
