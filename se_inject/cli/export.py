"""``se-inject export``: a trained network in a form that needs no se_inject to load."""

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from se_inject.cli.lightning import TrustCode, need_lightning
from se_inject.cli.options import Only, expand
from se_inject.finetune.options.config import CONFIG
from se_inject.keep.formats import FORMATS
from se_inject.plan.injection import Injection


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(map(repr, FORMATS))}.")
    return name


@expand
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL | RUN",
            help="The base: a timm name, torchvision/NAME, or module:callable; or the folder of a"
            " fine-tuning run, which knows its base and its weights.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The file to write; replaced as a whole.")
    ],
    injection: Annotated[Injection, Only("attention")],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What save_se or a fine-tuning run wrote; a RUN has it.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            callback=_known_format,
            help="What to write. "
            + "; ".join(f"{name}: {f.about} ({f.suffix})" for name, f in FORMATS.items())
            + ".",
        ),
    ] = "stock",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The base's own weights, where the first file does not hold them.",
            show_default="the library's pretrained weights",
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(min=0, help="Outputs of the base's classifier.", show_default="as saved"),
    ] = None,
    in_chans: Annotated[
        int | None,
        typer.Option(min=1, help="Input channels of the base.", show_default="the model's own"),
    ] = None,
    optimize: Annotated[
        bool,
        typer.Option(
            "--optimize",
            help="Write fewer operations that compute the same: norms and constant gates are folded"
            " into the layers before them, and the squeeze comes before the last 1x1 convolution.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a trained network in a form that needs no se_inject to load.

    Each file is compared with the model before it is kept. Which blocks go where is in the file
    of the weights; --attention is needed only where they are not SE blocks.

    Examples:

    - `se-inject export resnet50 --weights best.safetensors --output seresnet50.safetensors`

    - `se-inject export resnet50 --weights best.safetensors --format onnx --output net.onnx`

    - `se-inject export runs/resnet50-flowers --format onnx --optimize --output flowers.onnx`
    """
    from se_inject.keep.restore import restore_model

    form = FORMATS[target]
    if optimize and form.write_optimized is None:
        able = " or ".join(name for name, f in FORMATS.items() if f.write_optimized)
        raise typer.BadParameter(f"--optimize is for --format {able}; {target} fixes its layers")
    run = Path(model).expanduser()
    is_run = weights is None and (run / CONFIG).exists()
    if weights is None and not is_run:
        raise typer.BadParameter("give --weights FILE, or the folder of a run in place of MODEL")
    if is_run:
        need_lightning()
        if any(x is not None for x in (checkpoint, num_classes, in_chans, injection.attention)):
            raise typer.BadParameter("a run knows its base: give --output and --format alone")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        # torch and onnxscript warn of their own deprecations, some of which name another module.
        warnings.filterwarnings("ignore", module="torch|onnxscript")
        warnings.filterwarnings("ignore", category=FutureWarning)
        if weights is None:
            from se_inject.finetune.after.trained import load_run

            network = load_run(run, trust_code=trust_code).network.cpu()
        else:
            network = restore_model(
                model,
                weights,
                checkpoint=checkpoint,
                in_chans=in_chans,
                num_classes=num_classes,
                se_layer=injection.se_layer,
            )
        done = None
        if optimize:
            assert form.write_optimized is not None
            hint, done = form.write_optimized(network, output)
        else:
            hint = form.write(network, output)
    if as_json:
        said = {"file": str(output), "format": target, "load": hint}
        optimized = {} if done is None else {"optimized": done.to_dict()}
        print(json.dumps(said | optimized, indent=2))
    else:
        if done is not None:
            print(done)
        print(f"{output}: same outputs as the model. Load it with {hint}")
