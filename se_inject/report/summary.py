"""Plan + cost -> rich tables and JSON; no torch maths."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch import fx

from se_inject.edit.insert import edit_graph
from se_inject.errors import ArgumentError
from se_inject.plan.planner import Plan, Site, Skipped, layer_name, near_names, sum_costs
from se_inject.report.count import Costs, Count
from se_inject.report.latency import Latency
from se_inject.sites.residual import Reason

# How the block that is the model itself, whose name is empty, is shown.
MODEL_ITSELF = "(model)"
# More sites than this are shown stage by stage.
_MANY = 24


def print_report(
    console: Console,
    name: str,
    plan: Plan,
    costs: Costs,
    latency: Latency | None = None,
    *,
    verbose: bool = False,
) -> None:
    """Print everything that ``se-inject MODEL`` says.

    Args:
        console: where to; tables are fitted to its width.
        name: the model, as the user wrote it.
        latency: what ``--benchmark`` measured.
        verbose: one row a site however many there are, and every skipped addition.
    """
    _print_table(console, site_table(plan, by_stage=not verbose))
    if plan.skipped:
        _print_table(console, skipped_table(plan.skipped, verbose=verbose))
        console.print()
    timed = () if latency is None else _latency_lines(latency)
    for line in (summary(name, costs), *_notes(plan, costs), *timed):
        # Not broken: a terminal wraps it, and a pipe gets one line to search in.
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_table(console: Console, table: Table) -> None:
    """Print with every figure whole: a console that is too narrow wraps the lines."""
    width = console.width
    unlimited = console.options.update(max_width=1000)
    console.width = max(width, Measurement.get(console, unlimited, table).minimum)
    console.print(table, crop=False)
    console.width = width


def plan_table(plan: Plan) -> RenderableType:
    """What a :class:`Plan` looks like when printed with rich."""
    parts = [site_table(plan)]
    if plan.skipped:
        parts.append(skipped_table(plan.skipped))
    return Group(*parts)


def report_dict(
    name: str, plan: Plan, costs: Costs, latency: Latency | None = None
) -> dict[str, Any]:
    """The report as JSON-ready data, with the keys that scripts rely on.

    ``latency`` is a key of it only where it was measured.
    """
    data = plan.to_dict()
    report = {
        "model": name,
        "r": data["r"],
        "variant": data["variant"],
        "input_size": plan.input_size,
        "base": costs.base.to_dict(),
        "augmented": costs.augmented.to_dict(),
        "added": costs.added.to_dict(),
        "sites": data["sites"],
        "skipped": data["skipped"],
    }
    return report if latency is None else {**report, "latency": latency.to_dict()}


def site_table(plan: Plan, *, by_stage: bool = True) -> Table:
    """One row a site, or one a stage where there are many; the footer sums the columns."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, padding=0)
    total = plan.added
    grouped = by_stage and len(plan.sites) > _MANY
    rows = _stages(plan.sites) if grouped else [[site] for site in plan.sites]
    # Where 80 columns are too few, long block names are folded, never the figures.
    table.add_column("block", _plural(len(plan.sites), "site"), overflow="fold", min_width=8)
    table.add_column("map\nC×H×W", no_wrap=True)
    table.add_column("bottleneck\nC→rd", no_wrap=True)
    table.add_column("added\nparams", f"{total.params:,}", justify="right", no_wrap=True)
    for header, value in (
        ("MACs in\nlayers", total.layers),
        ("MACs in\nsqueeze", total.squeeze),
        ("MACs in\nscale", total.scale),
    ):
        table.add_column(header, f"{value:,}", justify="right", no_wrap=True)
    for sites in rows:
        cost = sum_costs(site.cost for site in sites)
        table.add_row(
            Text(_label(sites)),
            "×".join(map(str, sites[0].shape)),
            f"{sites[0].channels}→{sites[0].bottleneck or 'own'}",
            *(f"{v:,}" for v in (cost.params, cost.layers, cost.squeeze, cost.scale)),
        )
    return table


def _stages(sites: Sequence[Site]) -> list[list[Site]]:
    """Runs of sites with the same map and bottleneck."""
    runs = groupby(sites, key=lambda site: (site.shape, site.bottleneck))
    return [list(run) for _, run in runs]


def _label(sites: Sequence[Site]) -> str:
    """``layer3.0``, or ``layer3.0…22 ×23`` for a run; the part that differs is shown."""
    first, last = (site.block or MODEL_ITSELF for site in (sites[0], sites[-1]))
    if len(sites) == 1:
        number = re.sub(r"^\D+", "", sites[0].child)  # "2" of "se2", the block's second site
        return f"{first} #{number}" if number else first
    a, b = first.split("."), last.split(".")
    if len(a) == len(b):
        while len(a) > 1 and a[-1] == b[-1]:
            a.pop(), b.pop()
        same = next((i for i in range(len(a)) if a[i] != b[i]), 0)
        last = ".".join(last.split(".")[same:])
    return f"{first}…{last} ×{len(sites)}" if first != last else f"{first} ×{len(sites)}"


def skipped_table(skipped: Sequence[Skipped], *, verbose: bool = False) -> Table:
    """The additions that get no SE block: counted by reason, or each of them."""
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
    additions = sum(entry.reason != Reason.NOT_REACHED for entry in skipped)
    table.title = f"{_plural(additions, 'addition')} left alone"
    if verbose:
        table.add_column("block", overflow="fold")
        table.add_column("reason", overflow="fold")
        for entry in skipped:
            detail = f" ({entry.detail})" if entry.detail else ""
            table.add_row(Text(entry.block or MODEL_ITSELF), Text(f"{entry.reason}{detail}"))
        return table
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    table.add_column("such as", overflow="fold")
    examples = {entry.reason: entry.block or MODEL_ITSELF for entry in reversed(skipped)}
    for reason, count in Counter(entry.reason for entry in skipped).most_common():
        table.add_row(str(count), str(reason), Text(examples[reason]))
    return table


def summary(name: str, costs: Costs) -> str:
    """``resnet50: 25.56 M → 28.09 M parameters (+9.9 %), 4.089 → 4.103 GMACs (+0.33 %)``."""
    base, after = costs.base, costs.augmented
    params = (
        f"{_millions(base.params)} → {_millions(after.params)} parameters"
        f" (+{_percent(costs.added.params, base.params, 1)} %)"
    )
    if base.macs is None or after.macs is None:
        return f"{name}: {params}, +{_amount(costs.added, 1)}MACs"
    unit, letter = _unit(after.macs)
    macs = (
        f"{base.macs / unit:.3f} → {after.macs / unit:.3f} {letter}MACs"
        f" (+{_percent(costs.added.macs or 0, base.macs, 2)} %)"
    )
    return f"{name}: {params}, {macs}"


def _notes(plan: Plan, costs: Costs) -> Iterable[str]:
    size = "×".join(map(str, plan.input_size))
    if costs.base.macs is None or costs.augmented.macs is None:
        yield f"For one image of {size}; the base MACs cannot be counted without running it."
    else:
        unit, letter = _unit(2 * costs.augmented.macs)
        yield (
            f"For one image of {size}; in FLOPs"
            f" {2 * costs.base.macs / unit:.3f} → {2 * costs.augmented.macs / unit:.3f} {letter}."
        )
        yield "1 MAC = 2 FLOPs; the papers' GFLOPs are GMACs."
    if options := plan.variant.differing():
        said = ", ".join(f"{name}={value}" for name, value in options.items())
        yield f"The paper's variant with {said}."
    if plan.se_layer is not None:
        name = layer_name(plan.se_layer)
        yield f"{name} in place of SE blocks: it may change what the network computes."
    divisor = plan.variant.divisor
    floored = [s for s in plan.sites if s.bottleneck == divisor > s.channels / s.r]
    if floored:
        hint = " (--divisor 1 gives the paper's plain C/r)" if divisor > 1 else ""
        yield (
            f"{_plural(len(floored), 'bottleneck')} kept at width {divisor}, where C/r"
            f" is less{hint}."
        )


def _latency_lines(latency: Latency) -> Iterable[str]:
    threads = "" if latency.threads is None else f", {_plural(latency.threads, 'thread')}"
    low, middle, high = (100 * value for value in latency.overhead)
    yield (
        f"Latency at batch size {latency.batch_size} ({latency.device}{threads}):"
        f" {latency.before_ms:.2f} → {latency.after_ms:.2f} ms ({middle:+.1f} %; half of"
        f" {latency.rounds} rounds within {low:+.1f} to {high:+.1f} %)."
    )
    yield (
        "MACs and FLOPs hide this cost: SE reads every branch map once more, and its small layers"
        " run one after the other."
    )


def _amount(count: Count, digits: int) -> str:
    macs = count.macs or 0
    unit, letter = _unit(macs)
    return f"{macs / unit:.{digits}f} {letter}"


def _unit(value: int) -> tuple[float, str]:
    return (1e9, "G") if value >= 1e9 else (1e6, "M")


def _millions(value: int) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.2f} k"


def _percent(part: int, whole: int, digits: int) -> str:
    return f"{100 * part / whole:.{digits}f}" if whole else "∞"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- --show ------------------------------------------------------------------------------------


def block_code(plan: Plan, block: str) -> RenderableType:
    """The forward of one block as Python, before and after the injection.

    Both modes are shown where the forward reads ``self.training``.

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
    label = block or MODEL_ITSELF
    traced = plan.blocks[block]
    modes = {"": (traced.eval, 0)}
    if traced.train is not traced.eval:
        modes = {" in eval mode": (traced.eval, 0), " in train mode": (traced.train, 1)}
    parts: list[RenderableType] = []
    for mode, (forward, index) in modes.items():
        after = edit_graph(forward.graph, [site.where[index] for site in sites], children)
        parts += [
            Text(f"{label}: {kind}.forward before{mode}", style="bold"),
            _python(_source(forward.graph)),
            Text(f"\n{label}: SE{kind}.forward after{mode}", style="bold"),
            _python(_source(after)),
        ]
    return Group(*parts)


def _python(code: str) -> Syntax:
    return Syntax(code, "python", theme="ansi_dark", background_color="default", word_wrap=True)


def _source(graph: fx.Graph) -> str:
    """The code of a graph, without checks of flags and fx's notes on what is freed where."""
    lines = graph.python_code("self").src.splitlines()
    shown = (line for line in lines if line.strip() and "_expect(" not in line)
    return "\n".join(re.sub(r";  (\w+ = )+None$", "", line) for line in shown)
