"""``se-inject export``: a trained network in a form that needs no se_inject to load."""

import contextlib
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from se_inject.cli.options import Only, expand
from se_inject.plan.injection import Injection


class Format(StrEnum):
    stock = "stock"
    torch_export = "torch-export"
    onnx = "onnx"


@expand
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The base: a timm name, torchvision/NAME, or module:callable.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        Path,
        typer.Option(metavar="FILE", help="What save_se or a fine-tuning run wrote."),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The file to write; replaced as a whole.")
    ],
    injection: Annotated[Injection, Only("attention")],
    target: Annotated[
        Format,
        typer.Option(
            "--format",
            help="stock: the state dict of timm's own SE network, as .safetensors;"
            " torch-export: a .pt2 program; onnx.",
        ),
    ] = Format.stock,
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
) -> None:
    """Write a trained network in a form that needs no se_inject to load.

    Each file is compared with the model before it is kept. Which blocks go where is in the file
    of the weights; --attention is needed only where they are not SE blocks.

    Examples:

    - `se-inject export resnet50 --weights best.safetensors --output seresnet50.safetensors`

    - `se-inject export resnet50 --weights best.safetensors --format onnx --output net.onnx`
    """
    from se_inject.keep.formats.onnx import write_onnx
    from se_inject.keep.formats.program import write_torch_export
    from se_inject.keep.formats.stock import write_stock
    from se_inject.keep.restore import restore_model

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        # Their own deprecations, some of which name another module.
        warnings.filterwarnings("ignore", module="torch|onnxscript")
        warnings.filterwarnings("ignore", category=FutureWarning)
        network = restore_model(
            model,
            weights,
            checkpoint=checkpoint,
            in_chans=in_chans,
            num_classes=num_classes,
            se_layer=injection.se_layer,
        )
        if target is Format.stock:
            hint = write_stock(network, output)
        elif target is Format.torch_export:
            write_torch_export(network, output)
            hint = f"torch.export.load({str(output)!r}).module()"
        else:
            write_onnx(network, output)
            hint = f"onnxruntime.InferenceSession({str(output)!r})"
    print(f"{output}: same outputs as the model. Load it with {hint}")
