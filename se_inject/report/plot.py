"""Draws a plan as bars: the parameters, MACs and time that each SE block adds."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_inject.edit.site import Site, make_layer
from se_inject.errors import ArgumentError
from se_inject.gates.pictures import new_figure, write_figure
from se_inject.plan.plan import Plan
from se_inject.plan.table import MODEL_ITSELF
from se_inject.sites.scaled import ResidualSite

_ROUNDS = 15
_SUFFIXES = (".svg", ".png")
_NAMES = 60  # if there are more blocks than this, only every second or third name is shown


def plot_costs(plan: Plan, path: Path, milliseconds: dict[str, float] | None = None) -> Path:
    """Write a bar chart with a row for each SE block of a plan.

    Args:
        path: the chart. The name ends in .svg or .png.
        milliseconds: the result of :func:`time_sites`, which is shown in a third panel.

    Raises:
        ArgumentError: the path ends in something else.
    """
    if path.suffix not in _SUFFIXES:
        raise ArgumentError(f"--plot {path} must end in .svg or .png.")
    sites = plan.sites
    rows = list(range(len(sites)))
    height = max(2.5, 1.6 + 0.22 * min(len(sites), 100))
    panels = 2 if milliseconds is None else 3
    figure = new_figure(4.2 * panels, height)
    axes = figure.subplots(1, panels, sharey=True)
    axes[0].barh(rows, [site.params / 1e3 for site in sites], color="C0")
    axes[0].set(xlabel="thousands of parameters", title="added parameters")
    left = [0.0] * len(sites)
    for part, color in (("layers", "C0"), ("squeeze", "C1"), ("scale", "C2")):
        values = [getattr(site.cost, part) / 1e6 for site in sites]
        axes[1].barh(rows, values, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes[1].set(xlabel="millions of MACs an image", title="added MACs")
    axes[1].legend()
    if milliseconds is not None:
        axes[2].barh(rows, [milliseconds[site.name] for site in sites], color="C3")
        axes[2].set(xlabel="milliseconds", title="time of the SE block alone")
    step = -(-len(sites) // _NAMES)
    axes[0].set_yticks(rows[::step], [_label(site) for site in sites[::step]])
    axes[0].invert_yaxis()  # the first block of the network is on top
    return write_figure(figure, path.with_suffix(""), (path.suffix[1:],))[0]


def time_sites(
    plan: Plan, *, batch_size: int = 1, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The median time of each planned SE block by itself, in milliseconds, on random maps.

    If the SE block takes over an addition, the time of that addition is subtracted. The sum over
    all blocks is not the latency that SE adds to the network, because there the maps may still be
    in the cache.
    """
    device = torch.device(device)
    with torch.inference_mode():
        return {site.name: _time(site, plan, batch_size, device) for site in plan.sites}


def _time(site: Site, plan: Plan, batch_size: int, device: torch.device) -> float:
    layer = make_layer(site, plan.variant, plan.se_layer).to(device).eval()
    shape = list(site.shape)
    if site.layout.channels_last:
        shape = [*shape[1:], shape[0]]
    x, residual = torch.randn(2, batch_size, *shape, device=device).to(layer_dtype(layer))
    place = site.where[0]
    fused = isinstance(place, ResidualSite) and place.fused and plan.se_layer is None

    def seconds(call: Any) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    times = []
    for _ in range(_ROUNDS):
        if fused:
            spent = seconds(lambda: layer(x, residual)) - seconds(lambda: x + residual)
        else:
            spent = seconds(lambda: layer(x))
        times.append(spent)
    return max(0.0, 1e3 * statistics.median(times[2:]))


def layer_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's parameters, or float32 if it has none."""
    return next((p.dtype for p in layer.parameters()), torch.float32)


def _label(site: Site) -> str:
    name = site.block or MODEL_ITSELF
    return name if site.child in ("se", "se_inject") else f"{name}.{site.child}"
