"""``se-inject predict``: predict the classes of images with the chosen network of a run."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from se_inject.cli.lightning import TrustCode, need_lightning


def predict(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Image files, folders with images at any depth, or globs such as 'in/*.jpg'.",
            show_default=False,
        ),
    ],
    top: Annotated[
        int, typer.Option(min=1, help="The number of classes that are named for each image.")
    ] = 3,
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a table with one row for each image. An old file is replaced.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON list.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="The number of images in a batch.")] = 64,
    trust_code: TrustCode = False,
) -> None:
    """Print the likeliest classes of images, as the chosen network of RUN sees them.

    Each class has its probability. An image that cannot be read is named, the others are still
    predicted, and the exit status is then 1.

    Examples:

    - `se-inject predict runs/resnet50-flowers photo.jpg`

    - `se-inject predict runs/resnet50-flowers ./photos --top 1 --csv flowers.csv`
    """
    need_lightning()
    run = run.expanduser()
    from se_inject.finetune.after import evaluate as use
    from se_inject.finetune.after.predict import images_of, predict_all, write_predictions
    from se_inject.finetune.options.trust import printable

    trained = use.load_run(run, trust_code=trust_code)
    paths = images_of(images)
    top = min(top, len(trained.classes))
    found = []
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("images", total=len(paths))
        for one in predict_all(trained, paths, count=top, batch_size=batch_size):
            found.append(one)
            progress.advance(task)
            if one.error:
                print(f"error: {printable(one.error)}", file=sys.stderr)
            elif not as_json:
                likely = (f"{printable(name)} {100 * p:.1f} %" for name, p in one.likely)
                print(f"{printable(str(one.path))}: " + ", ".join(likely))
    if as_json:
        print(json.dumps([one.to_dict() for one in found], indent=2))
    if csv is not None:
        write_predictions(csv.expanduser(), found, top)
    if any(one.error for one in found):
        raise typer.Exit(1)
