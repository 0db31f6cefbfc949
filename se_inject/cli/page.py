"""``se-inject page``: show what a run found on one page."""

import json
from pathlib import Path
from typing import Annotated

import typer

from se_inject.cli.lightning import TrustCode, need_lightning


def page(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
    ],
    benchmark: Annotated[
        bool,
        typer.Option("--benchmark", help="Also measure the latency with and without SE blocks."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write RUN/page.html, one file that shows what a run found and opens offline.

    The page has the data, the curves, the verdict, the figures of each class, the gates of the SE
    blocks, the cost, and the command that repeats the run. finetune writes it at its end too.

    Examples:

    - `se-inject page runs/resnet50-flowers`
    """
    need_lightning()
    from se_inject.finetune.after.page import write_page

    path = write_page(run.expanduser(), trust_code=trust_code, benchmark=benchmark)
    print(json.dumps({"page": str(path)}, indent=2) if as_json else f"The page of the run: {path}")
