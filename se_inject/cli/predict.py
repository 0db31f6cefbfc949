"""``se-inject predict``: what the best network of a run says of images."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from se_inject.cli.lightning import TrustCode, need_lightning
from se_inject.errors import SEInjectError


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)
    ],
    trust_code: TrustCode = False,
) -> None:
    """Ask the best network of RUN about images: the likeliest classes with their probabilities."""
    need_lightning()
    run = run.expanduser()
    from se_inject.finetune import evaluate as use
    from se_inject.finetune.trust import printable

    trained = use.load_run(run, trust_code=trust_code)
    failed = 0
    for path in images:
        try:
            likely = use.predict(trained, path)
        except SEInjectError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"{path}: " + ", ".join(f"{printable(name)} {100 * p:.1f} %" for name, p in likely))
    if failed:
        raise typer.Exit(1)
