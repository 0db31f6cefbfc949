"""``se-inject finetune``: train a network with SE blocks, or go on with a run that was stopped."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from se_inject.cli.lightning import TrustCode, need_lightning
from se_inject.cli.options import AUTO, Given, expand, flag
from se_inject.errors import first_line
from se_inject.finetune.options.config import read_yaml
from se_inject.finetune.options.settings import ON_RESUME, Settings


@expand
def finetune(
    given: Annotated[Given, Settings],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="The folder that the run writes into.",
            show_default="runs/MODEL-DATA",
            rich_help_panel="Output",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with a run that was stopped, on this or another machine. With --epochs, a"
            " finished run is trained for longer.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Read options from this file, such as the config.yaml that a run writes. Options"
            " on the command line win over the file.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the summary of the run as exactly one JSON object.",
            rich_help_panel="Output",
        ),
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Fine-tune MODEL with SE blocks, and with --control also without them.

    At first only the SE blocks and a new head learn, while the base and its statistics are frozen.
    Then everything learns, the base at a smaller rate. The best weights, the figures of each epoch,
    the curves and a summary are written into the run folder.

    Examples:

    - `se-inject finetune resnet50 --data ./flowers`

    - `se-inject finetune resnet50 --data ./flowers --control --seeds 3`

    - `torchrun --nproc-per-node 4 -m se_inject finetune resnet50 --data ./flowers --devices 4`

    - `se-inject finetune --resume runs/resnet50-flowers`
    """
    if config is not None:
        if resume is not None:
            raise typer.BadParameter(
                "--config begins a run and --resume goes on with one: give only one of them"
            )
        given = Given({**read_yaml(config.expanduser()), **given})
    if ("model" in given) == (resume is not None):
        raise typer.BadParameter("give either MODEL or --resume RUN")
    if resume is not None and (others := sorted(given.keys() - {*ON_RESUME, "epochs"})):
        raise typer.BadParameter(
            f"--resume takes its options from {resume / 'config.json'}. Only --epochs,"
            f" {', '.join(map(flag, ON_RESUME))} may be changed, not"
            f" {', '.join(map(flag, others))}"
        )
    if resume is None and "data" not in given:
        raise typer.BadParameter(
            "give --data, which is a folder of images, or digits to try it out"
        )
    need_lightning()
    from se_inject.finetune.runs import trainer
    from se_inject.finetune.training.machine import rank

    console = Console(stderr=True)
    if resume is not None:
        folder = resume.expanduser()
        summary = trainer.resume(folder, console, trust_code=trust_code, **given)
    else:
        find = frozenset(name for name, value in given.items() if value == AUTO)
        find &= {"lr", "batch_size"}
        given = Given({name: value for name, value in given.items() if name not in find})
        settings = _with_whole_paths(Settings(**given))
        folder = output.expanduser() if output else _default_folder(settings)
        summary = trainer.start(settings, folder, console, find=find)
    if rank() == 0:
        if not as_json:
            _print_summary(summary, folder)
        page = _draw_page(folder)
        if as_json:
            where = {"run": str(folder), "page": None if page is None else str(page)}
            print(json.dumps({**summary, **where}, indent=2))
        elif page is not None:
            Console().print(f"The page of the run: {page}", highlight=False, soft_wrap=True)


def _draw_page(folder: Path) -> Path | None:
    """Write the page of the run. An error here is only a warning: the run itself is complete."""
    from se_inject.finetune.after.page import write_page

    try:
        return write_page(folder, trust_code=True)  # the user has just run that code
    except Exception as error:  # a library may raise anything while it draws
        print(
            f"warning: {folder}/page.html could not be drawn ({type(error).__name__}:"
            f" {first_line(error)}). The run is whole; se-inject page {folder} tries again.",
            file=sys.stderr,
        )
        return None


def _with_whole_paths(settings: Settings) -> Settings:
    """Make the paths absolute, so that the run can go on from another working directory."""
    paths = {"data_dir": settings.data_dir, "checkpoint": settings.checkpoint}
    if settings.data and Path(settings.data).expanduser().exists():
        paths["data"] = settings.data
    whole: dict[str, Any] = {
        name: str(Path(path).expanduser().resolve())
        for name, path in paths.items()
        if path is not None
    }
    return replace(settings, **whole)


def _default_folder(settings: Settings) -> Path:
    data = Path(settings.data)
    name = f"{settings.model}-{data.stem if data.suffix == '.csv' else data.name}"
    return Path("runs") / name.replace("/", "-").replace(":", "-")


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    from se_inject.report.console import print_table

    arms = summary["arms"]
    tested = any(row.get("test") for row in arms.values())
    columns = ["arm", "validation accuracy", *(["test accuracy"] if tested else []), "last epoch"]
    table = Table(*columns, "parameters", "GMACs", "seconds", box=None)
    for arm, row in arms.items():
        shares = [row, *([row["test"]] if tested else []), row["last"]]
        table.add_row(
            arm,
            *map(_share, shares),
            f"{row['params']:,}",
            "" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}",
            f"{row['seconds']:.0f}",
        )
    console = Console()
    print_table(console, table)
    for arm, row in arms.items():
        for line in _about(arm, row):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(summary["verdict"], highlight=False)
    console.print(f"Best weights, metrics and curves: {folder}", highlight=False, soft_wrap=True)


def _share(spread: dict[str, Any]) -> str:
    deviation = "" if spread["sd"] is None else f" ± {100 * spread['sd']:.2f}"
    return f"{100 * spread['mean']:.2f}{deviation} %"


def _about(arm: str, row: dict[str, Any]) -> list[str]:
    """Say which epoch was chosen, and give the figures that one large class cannot raise alone."""
    epochs = row["best_epoch"]
    which = "the last" if row["select"] == "last" else "the best"
    chosen = ", ".join(map(str, epochs))
    if len(epochs) > 1:
        chosen = f"{chosen} of its {len(epochs)} seeds"
    lines = [
        f"{arm}: the validation accuracy is that of {which} of {row['epochs']} epochs,"
        f" {'epochs' if len(epochs) > 1 else 'epoch'} {chosen}."
    ]
    if row["balanced_accuracy"] is not None:
        lines.append(
            f"  Balanced accuracy {100 * row['balanced_accuracy']:.2f} %,"
            f" macro F1 {100 * row['macro_f1']:.2f} %;"
            f" the largest class has {100 * row['majority_share']:.2f} %."
        )
    return lines
