"""Shows a plan and its costs as tables of rich and as JSON. Nothing is computed here."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from se_inject.layers.identity_start import FromIdentity
from se_inject.names import plural
from se_inject.plan.plan import Plan, layer_name
from se_inject.plan.table import site_table, skipped_table
from se_inject.report.console import print_table
from se_inject.report.count import Costs, Count
from se_inject.report.latency import Latency


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
        console: where the report is printed. Tables are fitted to its width.
        name: the name of the model, as the user wrote it.
        latency: what ``--benchmark`` measured.
        verbose: whether to print a row for each site, however many there are, and to list every
            skipped addition.
    """
    print_table(console, site_table(plan.sites, by_stage=not verbose))
    if plan.skipped:
        print_table(console, skipped_table(plan.skipped, verbose=verbose))
        console.print()
    timed = () if latency is None else _latency_lines(latency)
    for line in (summary(name, costs), *_notes(plan, costs), *timed):
        # The line is not broken here. A terminal wraps it, and a pipe gets one line to search in.
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def report_dict(
    name: str, plan: Plan, costs: Costs, latency: Latency | None = None
) -> dict[str, Any]:
    """The report as JSON-ready data, with the keys that scripts rely on.

    It has the key ``latency`` only if the latency was measured.
    """
    data = plan.to_dict()
    report = {
        "model": name,
        "r": data["r"],
        "where": data["where"],
        "variant": data["variant"],
        "input_size": plan.input_size,
        "base": costs.base.to_dict(),
        "augmented": costs.augmented.to_dict(),
        "added": costs.added.to_dict(),
        "sites": data["sites"],
        "skipped": data["skipped"],
    }
    return report if latency is None else {**report, "latency": latency.to_dict()}


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
        yield (
            f"For one image of {size}, these are the added MACs. Those of the base cannot be"
            " counted without running the network."
        )
    else:
        unit, letter = _unit(2 * costs.augmented.macs)
        yield (
            f"For one image of {size}, this is"
            f" {2 * costs.base.macs / unit:.3f} → {2 * costs.augmented.macs / unit:.3f}"
            f" {letter}FLOPs."
        )
        yield "1 MAC = 2 FLOPs; the papers' GFLOPs are GMACs."
    if plan.where == "auto" and any(site.kind == "unit" for site in plan.sites):
        yield (
            "The network has no residual additions: the SE blocks go on the ends of its other"
            " units (--where auto)."
        )
    if options := plan.variant.differing():
        said = ", ".join(f"{name}={value}" for name, value in options.items())
        whose = "A variant" if plan.variant.shift else "The paper's variant"  # it has no shift
        yield f"{whose} with {said}."
    if plan.se_layer is not None:
        name = layer_name(plan.se_layer)
        starts = isinstance(plan.se_layer, FromIdentity)
        said = (
            "each starts as the identity" if starts else "it may change what the network computes"
        )
        yield f"{name} in place of SE blocks: {said}."
    divisor = plan.variant.divisor
    floored = [s for s in plan.sites if s.bottleneck == divisor > s.channels / s.r]
    if floored:
        hint = " (--divisor 1 gives the paper's plain C/r)" if divisor > 1 else ""
        yield (
            f"{plural(len(floored), 'bottleneck')} kept at width {divisor}, where C/r"
            f" is less{hint}."
        )


def _latency_lines(latency: Latency) -> Iterable[str]:
    threads = "" if latency.threads is None else f", {plural(latency.threads, 'thread')}"
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
