"""Shows a plan as tables of rich."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from se_inject.edit.site import Site
from se_inject.layers.cost import sum_costs
from se_inject.layers.layout import KINDS
from se_inject.names import plural
from se_inject.reasons import UNIT_REASONS, Reason, Skipped

# The block that is the model itself has an empty name. This is shown in its place.
MODEL_ITSELF = "(model)"


# If there are more sites than this, they are shown stage by stage.
_MANY = 24


def plan_table(sites: Sequence[Site], skipped: Sequence[Skipped]) -> RenderableType:
    """What a :class:`se_inject.Plan` looks like when it is printed with rich."""
    parts = [site_table(sites)]
    if skipped:
        parts.append(skipped_table(skipped))
    return Group(*parts)


def site_table(sites: Sequence[Site], *, by_stage: bool = True) -> Table:
    """One row for each site, or for each stage if there are many. The footer sums the columns."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, padding=0)
    total = sum_costs(site.cost for site in sites)
    grouped = by_stage and len(sites) > _MANY
    rows = _stages(sites) if grouped else [[site] for site in sites]
    # If the terminal is too narrow, long block names are folded, but figures never are.
    table.add_column("block", plural(len(sites), "site"), overflow="fold", min_width=8)
    axes = dict.fromkeys(KINDS[site.layout.ndim].axes for site in sites)
    table.add_column(f"map\n{', '.join(axes)}", no_wrap=True)
    table.add_column("bottleneck\nC→rd", no_wrap=True)
    table.add_column("added\nparams", f"{total.params:,}", justify="right", no_wrap=True)
    for header, value in (
        ("MACs in\nlayers", total.layers),
        ("MACs in\nsqueeze", total.squeeze),
        ("MACs in\nscale", total.scale),
    ):
        table.add_column(header, f"{value:,}", justify="right", no_wrap=True)
    for row in rows:
        cost = sum_costs(site.cost for site in row)
        table.add_row(
            Text(_label(row)),
            "×".join(map(str, row[0].shape)),
            f"{row[0].channels}→{row[0].bottleneck or 'own'}",
            *(f"{v:,}" for v in (cost.params, cost.layers, cost.squeeze, cost.scale)),
        )
    return table


def _stages(sites: Sequence[Site]) -> list[list[Site]]:
    """Runs of sites that have the same map, bottleneck and kind."""
    runs = groupby(sites, key=lambda site: (site.shape, site.bottleneck, site.kind))
    return [list(run) for _, run in runs]


def _label(sites: Sequence[Site]) -> str:
    """The label of a row: ``layer3.0``, or ``layer3.0…22 ×23`` for a run of sites.

    The label of a unit says where its SE block is. It is ``unit: after features.2`` if the SE block
    scales what the block returns, and otherwise ``unit: in stage2.0``.
    """
    names = _names(sites)
    if sites[0].kind == "residual":
        return names
    return f"unit: {'after' if all(site.ends_block for site in sites) else 'in'} {names}"


def _names(sites: Sequence[Site]) -> str:
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
    """The additions and units that get no SE block: counted by reason, or (verbose) one by one."""
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
    units = sum(entry.reason in UNIT_REASONS for entry in skipped)
    additions = sum(entry.reason != Reason.NOT_REACHED for entry in skipped) - units
    counted = [plural(additions, "addition")] if additions or not units else []
    counted += [plural(units, "unit")] if units else []
    table.title = f"{' and '.join(counted)} left alone"
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
