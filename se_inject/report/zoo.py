"""Every model of timm and torchvision -> what could be injected: the coverage table.

Each model is built on the meta device, planned and injected there; nothing is downloaded or run.
"""

import fnmatch
import multiprocessing
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from threading import Thread
from typing import Any, Literal

from rich import box
from rich.table import Table

from se_inject.errors import NoSiteError, SEInjectError
from se_inject.models.names import load_model
from se_inject.plan.planner import Plan, plan_se
from se_inject.sites.residual import Reason

Library = Literal["timm", "torchvision", "all"]


@dataclass(frozen=True)
class Survey:
    """What planning one model gave."""

    model: str
    family: str  # the library's file: "timm resnet"
    sites: int
    skipped: Counter[str] = field(default_factory=Counter)  # additions by reason
    error: str | None = None  # why it could not be planned; None also where there is no site
    build_seconds: float = 0.0
    inject_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped)}


def model_names(library: Library = "all", pattern: str = "*") -> list[str]:
    """All names of the libraries that match a glob, as :func:`load_model` takes them."""
    names: list[str] = []
    if library in ("timm", "all"):
        import timm

        names += timm.list_models()
    if library in ("torchvision", "all"):
        from torchvision.models import list_models

        names += [f"torchvision/{name}" for name in list_models()]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def family_of(name: str) -> str:
    """The library and the file of it that builds a model."""
    if name.startswith("torchvision/"):
        from torchvision.models import get_model_builder

        builder = get_model_builder(name.removeprefix("torchvision/"))
        return f"torchvision {builder.__module__.removeprefix('torchvision.models.')}"
    import timm

    return f"timm {timm.model_entrypoint(name).__module__.rpartition('.')[2]}"


def survey(name: str) -> Survey:
    """Build one model on meta, plan it and inject it."""
    family = family_of(name)
    start = time.perf_counter()
    built = start
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about their models
            model = load_model(name, meta=True)
            built = time.perf_counter()
            plan: Plan | NoSiteError = _plan(model)
            if isinstance(plan, Plan):
                plan.apply()
        error = None
    except SEInjectError as failure:
        plan, error = NoSiteError(str(failure)), str(failure)
    except Exception as failure:  # a fault of ours: the table must show it, not end at it
        plan, error = NoSiteError(str(failure)), f"{type(failure).__name__}: {failure}"
    return Survey(
        name,
        family,
        sites=len(plan.sites) if isinstance(plan, Plan) else 0,
        skipped=Counter(str(entry.reason) for entry in plan.skipped),
        error=error,
        build_seconds=built - start,
        inject_seconds=time.perf_counter() - built,
    )


def _plan(model: Any) -> Plan | NoSiteError:
    try:
        return plan_se(model)
    except NoSiteError as error:
        return error


def survey_all(names: Sequence[str], workers: int) -> Iterator[Survey]:
    """Survey many models in parallel processes, in the order in which they finish."""
    # Not forked: the parent has the threads of a progress bar.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(survey, name) for name in names]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed: it would wait for its next model for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class Family:
    """One row of the coverage table."""

    name: str
    models: int
    injectable: int
    sites: int
    skipped: Counter[str]
    failed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped)}


def families(surveys: Iterable[Survey]) -> list[Family]:
    """Surveys summed by family, in the order of their names."""
    rows: dict[str, list[Survey]] = {}
    for entry in surveys:
        rows.setdefault(entry.family, []).append(entry)
    return [
        Family(
            name,
            models=len(entries),
            injectable=sum(entry.sites > 0 for entry in entries),
            sites=sum(entry.sites for entry in entries),
            skipped=sum((entry.skipped for entry in entries), Counter()),
            failed=sum(entry.error is not None for entry in entries),
            seconds=sum(entry.inject_seconds for entry in entries),
        )
        for name, entries in sorted(rows.items())
    ]


# --- the table ---------------------------------------------------------------------------------

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
}


def coverage_table(rows: Sequence[Family]) -> Table:
    """One row a family."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), show_footer=True)
    total = _total(rows)
    for header, footer in zip(_HEADERS, _cells(total), strict=True):
        right = header not in (_HEADERS[0], _HEADERS[-1])
        table.add_column(header, footer, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def coverage_markdown(surveys: Sequence[Survey], command: str, seconds: float) -> str:
    """The table, what failed, and how all of it was made, as a page of the documentation."""
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
    """A line for each model that could not be planned; no residual site is no failure."""
    failed = sorted((s for s in surveys if s.error), key=lambda s: s.model)
    return [f"- {s.model}: {' '.join(str(s.error).split())}" for s in failed] or ["None."]


_HEADERS = ("family", "models", "injectable", "sites", "seconds", "additions left alone")


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
        f"{row.seconds:.1f}",
        "; ".join(filter(None, [reasons, failed])),
    ]


def _total(rows: Sequence[Family]) -> Family:
    return Family(
        "all",
        models=sum(row.models for row in rows),
        injectable=sum(row.injectable for row in rows),
        sites=sum(row.sites for row in rows),
        skipped=sum((row.skipped for row in rows), Counter()),
        failed=sum(row.failed for row in rows),
        seconds=sum(row.seconds for row in rows),
    )
