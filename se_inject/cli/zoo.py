"""``se-inject zoo``: plan and inject every model of timm and torchvision, and count the results."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from se_inject.cli.options import Only, expand
from se_inject.errors import ArgumentError
from se_inject.plan.injection import Injection


class Library(StrEnum):
    timm = "timm"
    torchvision = "torchvision"
    all = "all"


@expand
def zoo(
    injection: Annotated[Injection, Only("where")],
    pattern: Annotated[
        str,
        typer.Option(
            "--filter", metavar="GLOB", help="Survey only models whose names match this glob."
        ),
    ] = "*",
    library: Annotated[
        Library, typer.Option(help="The library whose models are surveyed.")
    ] = Library.all,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md",
            help="Also write the table into this file, as Markdown.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="The number of parallel processes.", show_default="one per processor"
        ),
    ] = None,
) -> None:
    """Plan and inject every model of timm and torchvision, and count what was found by family.

    The models are built without weights: nothing is downloaded, and nothing is run.

    Examples:

    - `se-inject zoo --library torchvision`

    - `se-inject zoo --filter 'resnet*' --output resnets.md`

    - `se-inject zoo --filter '*nasnet*' --where units`
    """
    import os
    import time

    from rich.progress import Progress

    from se_inject.report.console import print_table
    from se_inject.report.coverage import coverage_markdown, coverage_table, failures
    from se_inject.report.zoo import families, model_names, survey_all

    names = model_names(library.value, pattern)
    if not names:
        raise ArgumentError(f"--filter {pattern!r} matches no model of {library.value}.")
    if output is not None and not output.parent.is_dir():
        raise ArgumentError(f"--output {output}: there is no folder {output.parent}.")
    start = time.perf_counter()
    surveys = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("models", total=len(names))
        for entry in survey_all(names, workers or os.cpu_count() or 1, injection.where):
            surveys.append(entry)
            progress.update(task, advance=1, description=entry.model)
    surveys.sort(key=lambda entry: names.index(entry.model))
    seconds = time.perf_counter() - start
    if as_json:
        rows = [row.to_dict() for row in families(surveys)]
        models = [entry.to_dict() for entry in surveys]
        print(json.dumps({"families": rows, "models": models, "seconds": seconds}, indent=2))
    else:
        console = Console()
        print_table(console, coverage_table(families(surveys)))
        console.print(f"\nNot planned ({len(names)} models in {seconds:.0f} s):", highlight=False)
        for line in failures(surveys):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if output is not None:
        command = "se-inject zoo" + (f" --library {library.value}" if library != "all" else "")
        command += f" --filter {pattern!r}" if pattern != "*" else ""
        command += f" --where {injection.where}" if injection.where != "auto" else ""
        output.write_text(coverage_markdown(surveys, f"{command} --output {output}", seconds))
