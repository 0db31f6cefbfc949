"""``se-inject evaluate``: what the best network of a run is worth."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from se_inject.cli.lightning import need_lightning


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="Other data with the same classes.", show_default="those of the run"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
) -> None:
    """Measure the best network of RUN: top-1, top-5, each class; confusion matrix in the folder."""
    need_lightning()
    run = run.expanduser()
    from se_inject.finetune import evaluate as use

    result = use.evaluate(use.load_run(run), run, data)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = Console()
    console.print(
        f"{result['images']} images: top-1 {100 * result['top1']:.2f} %,"
        f" top-5 {100 * result['top5']:.2f} %",
        highlight=False,
    )
    for name, accuracy in result["classes"].items():
        share = "no image" if accuracy is None else f"{100 * accuracy:6.2f} %"
        console.print(f"  {share}  {name}", highlight=False, markup=False)
    if result["unreadable"]:
        console.print(f"{len(result['unreadable'])} images could not be read.", highlight=False)
    console.print(f"Confusion matrix: {run / 'confusion.png'}, .csv", highlight=False)
