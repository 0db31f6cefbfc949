"""``se-inject evaluate``: measure the chosen network of a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from se_inject.cli.lightning import TrustCode, need_lightning


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Measure on other data with the same classes, named as for finetune. Their"
            " confusion matrix is written beside that of the run.",
            show_default="those of the run",
        ),
    ] = None,
    arm: Annotated[
        Literal["se", "control"],
        typer.Option(
            metavar="se | control",
            help="The network that is measured: the one with SE blocks, or the control. Of several"
            " seeds it is the best one.",
        ),
    ] = "se",
    tta: Annotated[
        bool,
        typer.Option(
            "--tta", help="Average the probabilities for each image and for its mirror image."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Measure the chosen network of RUN on the images that the run validated on.

    The confusion matrix is written into the run folder, as a table and as a picture.

    Examples:

    - `se-inject evaluate runs/resnet50-flowers`

    - `se-inject evaluate runs/resnet50-flowers --arm control --json`

    - `se-inject evaluate runs/resnet50-flowers --data ./other-flowers --tta`
    """
    need_lightning()
    run = run.expanduser()
    from se_inject.finetune.after import evaluate as use

    trained = use.load_run(run, trust_code=trust_code, arm=arm)
    result = use.evaluate(replace(trained, mirrored=tta), run, data)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from se_inject.finetune.options.trust import printable
    from se_inject.report.console import print_table

    console = Console()
    top5 = "" if result["top5"] is None else f", top-5 {100 * result['top5']:.2f} %"
    console.print(
        f"{result['images']} images: top-1 {100 * result['top1']:.2f} %{top5}", highlight=False
    )
    console.print(
        f"balanced accuracy {100 * result['balanced_accuracy']:.2f} %,"
        f" macro F1 {100 * result['macro_f1']:.2f} %;"
        f" the largest class has {100 * result['majority_share']:.2f} % of the images",
        highlight=False,
    )
    table = Table("class", "images", "precision", "recall", "F1", "AUROC", box=None)
    for name, row in result["by_class"].items():
        shares = (row["precision"], row["recall"], row["f1"])
        cells = ["-" if share is None else f"{100 * share:.2f} %" for share in shares]
        area = "-" if row["auroc"] is None else f"{row['auroc']:.4f}"
        table.add_row(Text(printable(name)), f"{row['images']:,}", *cells, area)
    print_table(console, table)
    if result["unreadable"]:
        console.print(f"{len(result['unreadable'])} images could not be read.", highlight=False)
    files = ", ".join(result["files"])
    console.print(f"Confusion matrix: {files}", highlight=False, soft_wrap=True)
