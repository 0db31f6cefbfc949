"""Shows the coverage of the zoo as a table and as a page of the documentation."""

import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from rich import box
from rich.table import Table

from se_inject.reasons import Reason
from se_inject.report.zoo import Family, Survey, families

# Short words for the reasons, so that a row fits.
_SHORT = {
    Reason.GATED: "gated",
    Reason.REPARAMETERISABLE: "re-parameterisable",
    Reason.FUSION: "fusion",
    Reason.NO_CONVOLUTION: "no convolution",
    Reason.TOKENS: "tokens",
    Reason.INNER: "inner",
    Reason.CHANNELS_UNKNOWN: "channels unknown",
    Reason.UNTRACED: "untraced",
    Reason.NOT_REACHED: "not reached",
    Reason.UNIT_GATED: "gated unit",
    Reason.ONE_POSITION: "one position",
    Reason.NOTHING_LEARNS: "last unit",
    Reason.SHARED_ACTIVATION: "shared activation",
}


def coverage_table(rows: Sequence[Family]) -> Table:
    """The table, with one row for each family."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), show_footer=True)
    total = _total(rows)
    for header, footer in zip(_HEADERS, _cells(total), strict=True):
        right = header not in (_HEADERS[0], _HEADERS[-1])
        table.add_column(
            header,
            footer,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=header == _HEADERS[0],
            min_width=max(map(len, header.split())),
        )
    for row in rows:
        table.add_row(*_cells(row))
    return table


def coverage_markdown(surveys: Sequence[Survey], command: str, seconds: float) -> str:
    """A page of the documentation: the table, the failures, and how all of this was made."""
    rows = families(surveys)
    lines = [
        "# Coverage",
        "",
        f"Made by `{command}` on {datetime.now(UTC).date().isoformat()} in {seconds / 60:.1f}"
        f" minutes: timm {version('timm')}, torchvision {version('torchvision')},"
        f" torch {version('torch')}.",
        "",
        f"{_HEADERS[2].capitalize()}: models that get at least one SE block. Seconds: of planning"
        " and injecting all models of the family on meta tensors, beside their construction;"
        f" median {statistics.median(s.inject_seconds for s in surveys):.2f} s a model.",
        "",
        "| " + " | ".join(_HEADERS) + " |",
        "|---|" + "---:|" * (len(_HEADERS) - 2) + "---|",
        *("| " + " | ".join(_cells(row)) + " |" for row in [*rows, _total(rows)]),
        "",
        "## Not planned",
        "",
        *failures(surveys),
    ]
    return "\n".join(lines) + "\n"


def failures(surveys: Sequence[Survey]) -> list[str]:
    """A line for each model that could not be planned. A model without sites is no failure."""
    failed = sorted((s for s in surveys if s.error), key=lambda s: s.model)
    return [f"- {s.model}: {' '.join(str(s.error).split())}" for s in failed] or ["None."]


_HEADERS = ("family", "models", "injectable", "sites", "of them units", "seconds", "left alone")


def _cells(row: Family) -> list[str]:
    reasons = ", ".join(
        f"{count} {_SHORT.get(Reason(reason), reason)}"
        for reason, count in row.skipped.most_common()
    )
    failed = f"{row.failed} not planned" if row.failed else ""
    return [
        row.name,
        str(row.models),
        str(row.injectable),
        str(row.sites),
        str(row.units),
        f"{row.seconds:.1f}",
        "; ".join(filter(None, [reasons, failed])),
    ]


def _total(rows: Sequence[Family]) -> Family:
    return Family(
        "all",
        models=sum(row.models for row in rows),
        injectable=sum(row.injectable for row in rows),
        sites=sum(row.sites for row in rows),
        units=sum(row.units for row in rows),
        skipped=sum((row.skipped for row in rows), Counter()),
        failed=sum(row.failed for row in rows),
        seconds=sum(row.seconds for row in rows),
    )
