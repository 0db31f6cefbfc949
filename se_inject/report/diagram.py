"""Draws one block before and after the injection, as boxes and arrows."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from torch import fx, nn

from se_inject.edit.rewrite import edit_graph
from se_inject.edit.site import Site
from se_inject.errors import ArgumentError, first_line
from se_inject.gates.pictures import new_figure, write_figure
from se_inject.keep.atomic import atomic_write
from se_inject.layers.gates import GATES
from se_inject.names import near_names
from se_inject.plan.plan import Plan, layer_name
from se_inject.plan.table import MODEL_ITSELF

# The boxes of one graph, name -> (label, whether it is new), and the arrows between them.
Boxes = tuple[dict[str, tuple[str, bool]], list[tuple[str, str]]]
_NEW, _OLD = "#f4b183", "#dbe5f1"


def draw_block(plan: Plan, block: str, path: Path) -> Path:
    """Draw the forward of one block in eval mode, before and after. SE blocks are orange.

    Graphviz's ``dot`` draws the picture if it is installed, and matplotlib otherwise. Children that
    are ``nn.Identity`` do nothing and are left out.

    Args:
        path: the picture. The name ends in .svg or .png.

    Raises:
        ArgumentError: the block gets no SE block, or the path ends in something else.
    """
    if path.suffix not in (".svg", ".png"):
        raise ArgumentError(f"--output {path} must end in .svg or .png.")
    block = "" if block == MODEL_ITSELF else block
    sites = [site for site in plan.sites if site.block == block]
    if not sites:
        near = near_names(block, [site.block or MODEL_ITSELF for site in plan.sites])
        raise ArgumentError(f"block {block!r} gets no SE block. Blocks that do: {near}.")
    module = plan.model.get_submodule(block)
    children = tuple(site.child for site in sites)
    graph = plan.blocks[block].eval.graph
    after = edit_graph(
        graph, [site.where[0] for site in sites], children, fuse=plan.se_layer is None
    )
    new = {site.child: _inserted(plan, site) for site in sites}
    name = block or MODEL_ITSELF
    parts = {
        f"{name}: {type(module).__name__}": _boxes(graph, module, {}),
        f"SE{type(module).__name__}": _boxes(after, module, new),
    }
    if dot := shutil.which("dot"):
        return _by_dot(dot, dot_source(parts), path)
    return _by_matplotlib(parts, path)


def dot_source(parts: dict[str, Boxes]) -> str:
    """The graphs in the language of graphviz, one above the other."""
    lines = [
        "digraph {",
        "rankdir=LR nodesep=0.15 ranksep=0.22 fontname=Helvetica",
        'node [shape=box style="filled,rounded" fontname=Helvetica fontsize=11 margin="0.06,0.04"'
        " width=0.3]",
    ]
    # When graphs run from left to right, graphviz puts the cluster that is written last on top.
    for number, (title, (boxes, arrows)) in reversed(list(enumerate(parts.items()))):
        lines += [f"subgraph cluster_{number} {{", f"label={_quoted(title)} color=gray"]
        for name, (label, new) in boxes.items():
            color = _NEW if new else _OLD
            own = _quoted(f"{number} {name}")
            lines.append(f'{own} [label={_quoted(label)} fillcolor="{color}"]')
        lines += [f"{_quoted(f'{number} {a}')} -> {_quoted(f'{number} {b}')}" for a, b in arrows]
        lines.append("}")
    return "\n".join([*lines, "}"]) + "\n"


def _inserted(plan: Plan, site: Site) -> tuple[str, ...]:
    """The lines in the box of an inserted layer: its kind, what it computes, and its addition.

    The last line is shown only in boxes with two inputs.
    """
    if plan.se_layer is not None:
        return layer_name(plan.se_layer), ""
    variant = plan.variant
    squeeze = {"avg": "mean of each channel", "max": "maximum of each channel", "none": "none"}
    return (
        "SqueezeExcite",
        f"squeeze: {squeeze[variant.squeeze]}",
        f"excite: {site.channels}→{site.bottleneck}→{site.channels}",
        f"gate: {GATES[variant.gate].formulas[variant.init]}",
        *(("shift: added behind the gate",) if variant.shift else ()),
        "branch × gate + shortcut" if variant.placement == "standard" else "map × gate + other map",
    )


def _boxes(graph: fx.Graph, module: nn.Module, new: dict[str, tuple[str, ...]]) -> Boxes:
    """The boxes on the way from the inputs to the output, without the checks of flags."""
    output = next(node for node in graph.nodes if node.op == "output")
    wanted = {output}
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    nodes = [node for node in graph.nodes if node in wanted and not _is_identity(node, module, new)]
    boxes = {node.name: (_label(node, module, new), str(node.target) in new) for node in nodes}
    arrows = []
    for node in nodes:
        for source in node.all_input_nodes:
            while _is_identity(source, module, new):
                source = source.all_input_nodes[0]
            arrows.append((source.name, node.name))
    return boxes, arrows


def _is_identity(node: fx.Node, module: nn.Module, new: dict[str, tuple[str, ...]]) -> bool:
    if node.op != "call_module" or str(node.target) in new or len(node.all_input_nodes) != 1:
        return False
    return type(module.get_submodule(str(node.target))) is nn.Identity


def _label(node: fx.Node, module: nn.Module, new: dict[str, tuple[str, ...]]) -> str:
    target = str(node.target)
    if node.op == "output":
        return "output"
    if node.op == "placeholder":
        return target.removeprefix("*")
    if node.op == "call_module":
        if target in new:
            kind, *lines, addition = new[target]
            if len(node.all_input_nodes) > 1:
                kind, lines = f"{kind} and sum", [*lines, addition]
        else:
            child: Any = module.get_submodule(target)
            kind, lines = type(child).__name__, []
            if hasattr(child, "kernel_size") and hasattr(child, "out_channels"):
                kind += " " + "×".join(map(str, child.kernel_size))
                lines = [f"{child.in_channels}→{child.out_channels}"]
        return "\n".join([target, kind, *lines])
    return getattr(node.target, "__name__", target).strip("_")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _by_dot(dot: str, source: str, path: Path) -> Path:
    with atomic_write(path) as part:
        done = subprocess.run(
            [dot, f"-T{path.suffix[1:]}"], input=source.encode(), capture_output=True, check=False
        )
        if done.returncode:
            raise ArgumentError(f"dot cannot draw the block ({first_line(OSError(done.stderr))}).")
        part.write_bytes(done.stdout)
    return path


def _by_matplotlib(parts: dict[str, Boxes], path: Path) -> Path:
    rows = {title: _rows(boxes) for title, boxes in parts.items()}
    deepest = max(max(row for row, _ in places.values()) for places in rows.values())
    widths = [1 + max(column for _, column in places.values()) for places in rows.values()]
    figure = new_figure(2.6 * sum(widths) + 1.2, 0.75 * (deepest + 2))
    panels = figure.subplots(1, len(parts), width_ratios=widths, sharey=True)
    for axes, width, (title, (boxes, arrows)) in zip(panels, widths, parts.items(), strict=True):
        places = rows[title]
        axes.set_title(title)
        axes.set(xlim=(-0.6, width - 0.4), ylim=(deepest + 0.6, -0.6))
        axes.axis("off")
        patches = {}
        for name, (label, new) in boxes.items():
            row, column = places[name]
            color = _NEW if new else _OLD
            frame = {"boxstyle": "round", "facecolor": color, "edgecolor": "0.4"}
            text = axes.text(
                column, row, label, ha="center", va="center", fontsize=8, zorder=2, bbox=frame
            )
            patches[name] = text.get_bbox_patch()
        for start, end in arrows:
            (y1, x1), (y2, x2) = places[start], places[end]
            begin: tuple[float, float] = (x1, y1)
            style: dict[str, Any] = {
                "arrowstyle": "-|>",
                "color": "0.3",
                "shrinkA": 0,
                "shrinkB": 2,
            }
            style |= {"patchA": patches[start], "patchB": patches[end]}
            if y2 - y1 > 1:  # the arrow goes around the boxes in between: sideways, down, and back
                beside = x1 + 0.5 if x1 == x2 else x1
                axes.plot([x1, beside, beside], [y1, y1, y2], color="0.3", linewidth=1, zorder=0)
                begin = (beside, y2)
                style["patchA"] = None
            axes.annotate("", (x2, y2), begin, arrowprops=style, zorder=1)
    return write_figure(figure, path.with_suffix(""), (path.suffix[1:],))[0]


def _rows(boxes: Boxes) -> dict[str, tuple[int, int]]:
    """The row and column of each box. A box is below all boxes that lead to it.

    In each row, the first box of the graph is on the left.
    """
    names, arrows = boxes
    row = dict.fromkeys(names, 0)
    for start, end in arrows:  # the arrows are in the order of the graph
        row[end] = max(row[end], row[start] + 1)
    taken: dict[int, int] = {}
    places = {}
    for name in names:
        column = taken.get(row[name], 0)
        taken[row[name]] = column + 1
        places[name] = (row[name], column)
    return places
