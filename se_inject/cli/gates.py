"""``se-inject gates``: show what the gates of a trained network do."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from se_inject.cli.lightning import TrustCode, need_lightning
from se_inject.cli.options import Only, expand
from se_inject.errors import ArgumentError
from se_inject.plan.injection import Injection


@expand
def gates(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="The folder of a run; or, with --weights, the base: a name of timm,"
            " torchvision/NAME, or module:callable.",
            show_default=False,
        ),
    ],
    injection: Annotated[Injection, Only("attention")],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The file that save_se wrote of MODEL.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The weights of the base, where --weights does not hold all of them.",
            show_default="the library's pretrained weights",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="The images to run the network on, named as for finetune.",
            show_default="those that the run validated on",
        ),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="The side of the images in pixels, for MODEL.", show_default="its own"
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="The classes whose curves are drawn in the pictures.",
            show_default="four that differ most",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also write pictures (PNG and SVG) into this folder.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Say what each SE block does over many images: idle, constant, saturated, by class or image.

    A gate begins at 1. The table shows its mean, its spread over the images, between the classes
    and within a class (standard deviations), and the share of the variance that the class explains.
    Then come the shares of channels whose gate is always near 1 (idle), does not vary (fixed), is
    always near 0 (shut) or is always near its maximum. A sentence of advice follows the table.

    Examples:

    - `se-inject gates runs/resnet50-flowers --output pictures`

    - `se-inject gates resnet50 --weights se.safetensors --data ./flowers --json`
    """
    if weights is not None and data is None:
        raise typer.BadParameter("MODEL with --weights needs --data, the images to run it on")
    if weights is None and (checkpoint, img_size) != (None, None):
        raise typer.BadParameter("--checkpoint and --img-size belong to MODEL with --weights")
    if weights is None and not Path(target).expanduser().is_dir():
        raise ArgumentError(
            f"{target} is not a run folder. For a model, name the file of its SE blocks: --weights."
        )
    need_lightning()
    from se_inject.finetune.after import evaluate as use
    from se_inject.finetune.after import looked
    from se_inject.finetune.options.settings import Settings
    from se_inject.gates import advice, gate_statistics, gates_table, statistics_dict
    from se_inject.gates.pictures import write_pictures
    from se_inject.keep.restore import restore_model
    from se_inject.report.console import print_table

    with contextlib.redirect_stdout(sys.stderr):  # keeps prints of a user's builder out of stdout
        if weights is None:
            folder = Path(target).expanduser()
            run = use.load_run(folder, trust_code=trust_code)
            network = run.network
            batches = looked.batches_of_run(run, looked.split_of_run(run, folder, data))
        else:
            network = restore_model(
                target, weights, checkpoint=checkpoint, se_layer=injection.se_layer
            )
            settings = Settings(target, data=str(data), img_size=img_size)
            batches = looked.batches_of_model(network, settings)
        statistics = gate_statistics(network, batches, batches.classes)
        chosen = classes.split(",") if classes else None
        paths = [] if output is None else write_pictures(statistics, output.expanduser(), chosen)
    if as_json:
        print(json.dumps(statistics_dict(statistics), indent=2))
        return
    console = Console()
    print_table(console, gates_table(statistics))
    console.print(f"\n{advice(statistics)}", highlight=False, soft_wrap=True, markup=False)
    if paths:
        names = ", ".join(path.name for path in paths)
        console.print(f"Pictures in {output}: {names}", highlight=False, soft_wrap=True)
