"""The command line (Typer): parse, call, print.

Tables go to stdout, warnings and errors to stderr. Exit status: 0 done, 1 a clear error on one
or two lines, 2 wrong usage.
"""

import contextlib
import io
import json
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
from rich.console import Console

from se_inject.cli import finetune as commands
from se_inject.cli.options import (
    AttentionOption,
    BiasOption,
    DivisorOption,
    ExcludeOption,
    GateOption,
    IncludeOption,
    InitOption,
    PlacementOption,
    RatioOption,
    SqueezeOption,
    parse_ratio,
)
from se_inject.errors import ArgumentError, SEInjectError


class _DefaultReport(typer.core.TyperGroup):
    """``se-inject MODEL`` is ``se-inject report MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["report", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultReport,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog="`se-inject MODEL` is short for `se-inject report MODEL`: `se-inject resnet50 --r 16`,"
    " `se-inject torchvision/mobilenet_v2 --json`. Its options: `se-inject report --help`.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from se_inject import __version__

        print(f"se-inject {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Squeeze-and-Excitation for a network you already have."""


@app.command(name="report")
def report_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A timm name (with tag; hf-hub: too), torchvision/NAME, or module:callable.",
            show_default=False,
        ),
    ],
    r: RatioOption = ["16"],  # noqa: B006  # read only; typer shows it in the help
    divisor: DivisorOption = 8,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    placement: PlacementOption = "standard",
    squeeze: SqueezeOption = "avg",
    gate: GateOption = "sigmoid",
    bias: BiasOption = True,
    init: InitOption = "identity",
    attention: AttentionOption = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the input image in pixels.", show_default="the model's own"
        ),
    ] = None,
    in_chans: Annotated[
        int | None,
        typer.Option(min=1, help="Input channels.", show_default="the model's own"),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCK",
            help="Show the forward of this block as Python, before and after.",
            show_default=False,
        ),
    ] = None,
    benchmark: Annotated[
        bool,
        typer.Option("--benchmark", help="Also run it before and after, and report the latency."),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="Where --benchmark runs: cpu, cuda, cuda:1, mps.", show_default="cpu"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images in a batch of --benchmark.", show_default="1"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every site and every skipped addition.")
    ] = False,
) -> None:
    """Report what SE blocks would add to MODEL: parameters and MACs, block by block.

    The model is built without weights and is not run (hf-hub: fetches the model's config), except
    by --benchmark, which runs it with random weights.

    Examples:

    - `se-inject resnet50 --r 16`

    - `se-inject resnet50 --benchmark --batch-size 8`

    - `se-inject torchvision/mobilenet_v2 --img-size 192 --json`

    - `se-inject resnet50 --placement identity --squeeze max --gate tanh --no-bias`

    - `se-inject resnet50 --r 'layer4.*=32,16' --attention eca`

    - `se-inject my_pkg.nets:build --include 'stage3.*' --show stage3.0`
    """
    if as_json and show is not None:
        raise typer.BadParameter("--json and --show exclude each other")
    if benchmark and show is not None:
        raise typer.BadParameter("--benchmark and --show exclude each other")
    if not benchmark and (device, batch_size) != (None, None):
        raise typer.BadParameter("--device and --batch-size are of --benchmark: add it")
    ratio = parse_ratio(r)
    import torch

    from se_inject.graph.example import floating_dtype
    from se_inject.layers.attention import Attention
    from se_inject.models.names import load_model
    from se_inject.models.sizes import input_size
    from se_inject.plan.planner import plan_se
    from se_inject.report.code import block_code
    from se_inject.report.count import count_costs
    from se_inject.report.latency import check_device, measure_latency
    from se_inject.report.summary import print_report, report_dict

    with contextlib.redirect_stdout(sys.stderr):  # what a user's builder prints is no report
        place = check_device(device or "cpu") if benchmark else None
        network = load_model(model, in_chans=in_chans, meta=place is None)
        size = input_size(model, network, img_size, in_chans)
        plan = plan_se(
            network,
            ratio,
            include=include or None,
            exclude=exclude or None,
            placement=placement,
            squeeze=squeeze,
            gate=gate,
            bias=bias,
            init=init,
            divisor=divisor,
            se_layer=None if attention is None else Attention(attention),
            example_input=None
            if size is None
            else torch.empty(2, *size, dtype=floating_dtype(network), device="meta"),
        )
        costs = None if show is not None else count_costs(plan)
        latency = None
        if place is not None:
            with Console(stderr=True).status("Running it without and with SE blocks"):
                latency = measure_latency(plan, batch_size=batch_size or 1, device=place)
    console = Console()
    if costs is None:
        console.print(block_code(plan, show or ""))
    elif as_json:
        print(json.dumps(report_dict(model, plan, costs, latency), indent=2))
    else:
        print_report(console, model, plan, costs, latency, verbose=verbose)


class Library(StrEnum):
    timm = "timm"
    torchvision = "torchvision"
    all = "all"


@app.command()
def zoo(
    pattern: Annotated[
        str,
        typer.Option("--filter", metavar="GLOB", help="Only models whose name matches this glob."),
    ] = "*",
    library: Annotated[Library, typer.Option(help="Whose models.")] = Library.all,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md", help="Also write the table as Markdown.", show_default=False
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Parallel processes.", show_default="one a processor"),
    ] = None,
) -> None:
    """Plan and inject every model of timm and torchvision, and count what was found by family.

    The models are built on the meta device: no weights, no download, nothing is run.

    Examples:

    - `se-inject zoo --library torchvision`

    - `se-inject zoo --filter 'resnet*' --output resnets.md`
    """
    import os
    import time

    from rich.progress import Progress

    from se_inject.report.coverage import coverage_markdown, coverage_table, failures
    from se_inject.report.zoo import families, model_names, survey_all

    names = model_names(library.value, pattern)
    if not names:
        raise ArgumentError(f"--filter {pattern!r} matches no model of {library.value}.")
    if output is not None and not output.parent.is_dir():
        raise ArgumentError(f"--output {output}: there is no folder {output.parent}.")
    start = time.perf_counter()
    surveys = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("models", total=len(names))
        for entry in survey_all(names, workers or os.cpu_count() or 1):
            surveys.append(entry)
            progress.update(task, advance=1, description=entry.model)
    surveys.sort(key=lambda entry: names.index(entry.model))
    seconds = time.perf_counter() - start
    if as_json:
        rows = [row.to_dict() for row in families(surveys)]
        models = [entry.to_dict() for entry in surveys]
        print(json.dumps({"families": rows, "models": models, "seconds": seconds}, indent=2))
    else:
        console = Console()
        console.print(coverage_table(families(surveys)))
        console.print(f"\nNot planned ({len(names)} models in {seconds:.0f} s):", highlight=False)
        for line in failures(surveys):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if output is not None:
        command = "se-inject zoo" + (f" --library {library.value}" if library != "all" else "")
        command += f" --filter {pattern!r}" if pattern != "*" else ""
        output.write_text(coverage_markdown(surveys, f"{command} --output {output}", seconds))


class Format(StrEnum):
    stock = "stock"
    torch_export = "torch-export"
    onnx = "onnx"


@app.command()
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
    attention: AttentionOption = None,
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
    from se_inject.layers.attention import Attention

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
            se_layer=None if attention is None else Attention(attention),
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


app.command()(commands.finetune)
app.command()(commands.evaluate)
app.command()(commands.predict)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point of the ``se-inject`` script."""
    warnings.showwarning = _warn
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows "?" for "×"
            stream.reconfigure(errors="replace")
    try:
        app()
        sys.stdout.flush()
    except SEInjectError as error:
        _fail(str(error))
    except Warning as warning:  # python -W error makes errors of warnings
        _fail(f"{warning} (a warning, which -W error makes an error)")
    except OSError as error:  # a full disk, a closed pipe
        _fail(f"cannot write: {error}")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
