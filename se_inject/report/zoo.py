"""Plans every model of timm and torchvision, for the coverage table.

Each model is built on the meta device, and planned and injected there. Nothing is downloaded, and
no forward runs on real tensors.
"""

import fnmatch
import gc
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Literal

from se_inject.errors import NoSiteError, SEInjectError
from se_inject.models.names import load_model, timm_names
from se_inject.plan.plan import Plan
from se_inject.plan.planner import plan_se
from se_inject.sites.scaled import Where

Library = Literal["timm", "torchvision", "all"]


@dataclass(frozen=True)
class Survey:
    """What planning one model gave."""

    model: str
    family: str  # the library and its file, such as "timm resnet"
    sites: int
    units: int = 0  # how many of the sites are units
    skipped: Counter[str] = field(default_factory=Counter)  # additions and units by reason
    error: str | None = None  # why the model could not be planned; no site is no error
    build_seconds: float = 0.0
    inject_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped)}


def model_names(library: Library = "all", pattern: str = "*") -> list[str]:
    """All names of the libraries that match a glob, as :func:`load_model` takes them."""
    names: list[str] = []
    if library in ("timm", "all"):
        names += timm_names()
    if library in ("torchvision", "all"):
        from torchvision.models import list_models

        names += [f"torchvision/{name}" for name in list_models()]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def family_of(name: str) -> str:
    """The library that builds a model, and the file in it."""
    if name.startswith("torchvision/"):
        from torchvision.models import get_model_builder

        builder = get_model_builder(name.removeprefix("torchvision/"))
        return f"torchvision {builder.__module__.removeprefix('torchvision.models.')}"
    import timm

    return f"timm {timm.model_entrypoint(name).__module__.rpartition('.')[2]}"


def survey(name: str, where: Where = "auto") -> Survey:
    """Build one model on meta, plan it and inject it."""
    family = family_of(name)
    start = time.perf_counter()
    built = start
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries warn about their own models
            model = load_model(name, meta=True)
            built = time.perf_counter()
            plan: Plan | NoSiteError = _plan(model, where)
            if isinstance(plan, Plan):
                plan.apply()
        error = None
    except SEInjectError as failure:
        plan, error = NoSiteError(str(failure)), str(failure)
    except Exception as failure:  # a fault of se_inject, which the table must show
        plan, error = NoSiteError(str(failure)), f"{type(failure).__name__}: {failure}"
    return Survey(
        name,
        family,
        sites=len(plan.sites) if isinstance(plan, Plan) else 0,
        units=sum(s.kind == "unit" for s in plan.sites) if isinstance(plan, Plan) else 0,
        skipped=Counter(str(entry.reason) for entry in plan.skipped),
        error=error,
        build_seconds=built - start,
        inject_seconds=time.perf_counter() - built,
    )


def _plan(model: Any, where: Where) -> Plan | NoSiteError:
    try:
        return plan_se(model, where=where)
    except NoSiteError as error:
        return error


def survey_all(names: Sequence[str], workers: int, where: Where = "auto") -> Iterator[Survey]:
    """Survey many models in parallel processes, in the order in which they finish."""
    # The workers are not forked, because the parent has the threads of a progress bar.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(survey, name, where) for name in names]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    # What the imports made stays. Looking at all of it again and again takes an eighth of the time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed. It would wait for its next model for ever."""
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
    units: int  # how many of the sites are units
    skipped: Counter[str]
    failed: int  # how many models could not be planned
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped)}


def families(surveys: Iterable[Survey]) -> list[Family]:
    """The surveys summed by family, with the families in alphabetical order."""
    rows: dict[str, list[Survey]] = {}
    for entry in surveys:
        rows.setdefault(entry.family, []).append(entry)
    return [
        Family(
            name,
            models=len(entries),
            injectable=sum(entry.sites > 0 for entry in entries),
            sites=sum(entry.sites for entry in entries),
            units=sum(entry.units for entry in entries),
            skipped=sum((entry.skipped for entry in entries), Counter()),
            failed=sum(entry.error is not None for entry in entries),
            seconds=sum(entry.inject_seconds for entry in entries),
        )
        for name, entries in sorted(rows.items())
    ]
