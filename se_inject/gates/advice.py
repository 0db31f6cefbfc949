"""Shows statistics of gates as a table and gives one plain sentence of advice."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from se_inject.gates.statistics import BlockGates, GateStatistics
from se_inject.names import plural
from se_inject.plan.table import MODEL_ITSELF

# If this share of the variance or more is between classes, the class mostly decides about a gate.
_MOSTLY = 0.5


def verdict(block: BlockGates) -> str:
    """What an SE block does, in a word or two."""
    if block.idle == 1:
        return "idle"
    if block.constant == 1:
        return "constant"
    if block.near_zero + block.near_maximum == 1:
        return "saturated"
    if block.class_share is not None and block.class_share >= _MOSTLY:
        return "by class"
    return "by image"


def advice(statistics: GateStatistics) -> str:
    """One sentence about which SE blocks could go, and how much that would change at most."""
    blocks = statistics.blocks
    names = [block.block for block in blocks]
    still = [block for block in blocks if verdict(block) in ("idle", "constant")]
    over = f"over {plural(statistics.images, 'image')}"
    of = f"of {plural(len(blocks), 'SE block')}"
    if not still:
        by_class = max(blocks, key=lambda block: block.class_share or 0.0)
        most = ""
        if by_class.class_share:
            most = (
                f", and the class decides most about {_label(by_class.block)}"
                f" ({100 * by_class.class_share:.0f} % of the variance)"
            )
        return f"None {of} is idle or constant {over}: each changes what it scales{most}."
    verb = "is" if len(still) == 1 else "are"
    if all(verdict(block) == "idle" for block in blocks):
        return (
            f"All {of} {verb} idle {over}: training has not moved them, so train them longer or"
            " take them out with remove_se."
        )
    deviation = max(block.deviation for block in still)
    change = f"by more than {100 * deviation:.2g} % of its block's mean gate"
    where = ", ".join(globs([block.block for block in still], names))
    return (
        f"{len(still)} {of} {verb} idle or constant {over}. fold_se could fold {where} into the"
        f" layers before, and no gate there would change {change if deviation else 'at all'}."
    )


def globs(some: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names of blocks. If all blocks of a stage are among them, its glob stands for them.

    >>> globs(["a.1", "b.0", "b.1"], ["a.0", "a.1", "b.0", "b.1"])
    ['a.1', 'b.*']
    """
    found: dict[str, None] = {}
    for name in some:
        parts = name.split(".")
        stages = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
        for stage in stages:
            members = [other for other in names if other.startswith(stage)]
            if len(members) > 1 and set(members) <= set(some):
                found[f"{stage}*"] = None
                break
        else:
            found[_label(name)] = None
    return list(found)


def gates_table(statistics: GateStatistics) -> Table:
    """One row for each SE block, in the order of the network.

    The shares are shares of the block's channels. Only the share of the class is a share of the
    variance.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("block", overflow="fold", min_width=8)
    headers = ["mean\ngate", "spread\nimages"]
    if statistics.classes is not None:
        headers += ["betw.\nclass", "within\nclass", "class\n%"]
    headers += ["idle\n%", "fixed\n%", "shut\n%", "max.\n%"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("gates", no_wrap=True)
    for block in statistics.blocks:
        cells = [f"{block.mean:.3f}", f"{block.spread:.3f}"]
        if statistics.classes is not None:
            cells += [_number(block.between), _number(block.within), _percent(block.class_share)]
        shares = (block.idle, block.constant, block.near_zero, block.near_maximum)
        cells += map(_percent, shares)
        table.add_row(Text(_label(block.block)), *cells, verdict(block))
    return table


def statistics_dict(statistics: GateStatistics) -> dict[str, Any]:
    """The statistics as JSON-ready data, with the verdict on each block and the advice."""
    data = statistics.to_dict()
    for entry, block in zip(data["blocks"], statistics.blocks, strict=True):
        entry["gates"] = verdict(block)
    return {**data, "advice": advice(statistics)}


def _label(name: str) -> str:
    return name or MODEL_ITSELF


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"
