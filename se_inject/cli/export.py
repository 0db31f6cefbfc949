"""``se-inject export``: write a trained network in a form that loads without se_inject."""

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
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, FORMATS))}.")
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
        Path,
        typer.Option(metavar="FILE", help="The file to write. An old one is replaced as a whole."),
    ],
    injection: Annotated[Injection, Only("attention")],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file that save_se or a fine-tuning run wrote. A RUN has its own.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            callback=_known_format,
            help="The form of the file. "
            + "; ".join(f"{name}: {f.about} ({f.suffix})" for name, f in FORMATS.items())
            + ".",
        ),
    ] = "stock",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The weights of the base, where --weights does not hold all of them.",
            show_default="the library's pretrained weights",
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=0, help="The number of outputs of the base's classifier.", show_default="as saved"
        ),
    ] = None,
    in_chans: Annotated[
        int | None,
        typer.Option(
            min=1, help="The number of input channels of the base.", show_default="the model's own"
        ),
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
    """Write a trained network in a form that loads without se_inject.

    The file is read back and compared with the model before it is kept. The file of the weights
    says where its blocks go, so the options of the injection are not repeated here. Only where it
    has another attention, --attention must name it.

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
        raise typer.BadParameter(
            "MODEL needs --weights FILE; or give the folder of a run in its place"
        )
    if is_run:
        need_lightning()
        if any(x is not None for x in (checkpoint, num_classes, in_chans, injection.attention)):
            raise typer.BadParameter(
                "the run says what its base is: leave out all but --output and --format"
            )
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        # torch and onnxscript warn of their own deprecations. Some of these warnings name another
        # module, so FutureWarning is ignored as a whole.
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
