"""``se-inject report MODEL``: show what SE blocks would add to a network."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from se_inject.cli.options import expand
from se_inject.plan.injection import Injection


@expand
def report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The network: a name of timm (with a tag, or hf-hub:...), torchvision/NAME, or"
            " module:callable.",
            show_default=False,
        ),
    ],
    injection: Injection,
    img_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="The side of the input image in pixels.", show_default="the model's own"
        ),
    ] = None,
    in_chans: Annotated[
        int | None,
        typer.Option(min=1, help="The number of input channels.", show_default="the model's own"),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCK",
            help="Show the forward of this block as Python code, before and after the injection.",
            show_default=False,
        ),
    ] = None,
    diagram: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCK",
            help="Draw the forward of this block, before and after the injection, into --output.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The .svg or .png file that --diagram draws into.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw what each SE block adds into this .svg or .png file. With --benchmark"
            " the picture has its time too.",
            show_default=False,
        ),
    ] = None,
    benchmark: Annotated[
        bool,
        typer.Option(
            "--benchmark",
            help="Also measure the latency of the network without and with SE blocks.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="The device that --benchmark runs on: cpu, cuda, cuda:1 or mps.",
            show_default="cpu",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="The number of images in a batch of --benchmark.", show_default="1"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show every site and every addition that is left alone."
        ),
    ] = False,
) -> None:
    """Report what SE blocks would add to MODEL: parameters and MACs, block by block.

    The network is built without weights, and nothing of it is run. Only --benchmark runs it, with
    random weights. For a name with hf-hub: the config of the model is downloaded.

    Examples:

    - `se-inject resnet50 --r 16`

    - `se-inject resnet50 --benchmark --batch-size 8`

    - `se-inject torchvision/mobilenet_v2 --img-size 192 --json`

    - `se-inject resnet50 --placement identity --squeeze max --gate tanh --no-bias`

    - `se-inject resnet50 --r 'layer4.*=32,16' --attention eca`

    - `se-inject my_pkg.nets:build --include 'stage3.*' --show stage3.0`

    - `se-inject resnet50 --plot cost.svg`

    - `se-inject resnet50 --diagram layer1.0 --output block.svg`
    """
    given: dict[str, object] = {"--json": as_json, "--benchmark": benchmark, "--plot": plot}
    given |= {"--show": show, "--diagram": diagram}
    wanted = [name for name, value in given.items() if value not in (None, False)]
    # --show and --diagram print one thing alone, so neither goes with any of the others.
    if len(wanted) > 1 and (show, diagram) != (None, None):
        raise typer.BadParameter(f"{wanted[0]} and {wanted[-1]} exclude each other")
    if (diagram is None) != (output is None):
        raise typer.BadParameter(
            "--diagram BLOCK needs --output FILE, and --output needs --diagram"
        )
    if not benchmark and (device, batch_size) != (None, None):
        raise typer.BadParameter(
            "--device and --batch-size belong to --benchmark, which is missing"
        )
    import torch

    from se_inject.graph.example import floating_dtype
    from se_inject.models.names import load_model
    from se_inject.models.sizes import input_size
    from se_inject.plan.planner import make_plan
    from se_inject.report.code import block_code
    from se_inject.report.count import count_costs
    from se_inject.report.diagram import draw_block
    from se_inject.report.latency import check_device, measure_latency
    from se_inject.report.plot import plot_costs, time_sites
    from se_inject.report.summary import print_report, report_dict

    with contextlib.redirect_stdout(sys.stderr):  # keeps prints of a user's builder out of stdout
        place = check_device(device or "cpu") if benchmark else None
        network = load_model(model, in_chans=in_chans, meta=place is None)
        size = input_size(model, network, img_size, in_chans)
        example = None
        if size is not None:
            example = torch.empty(2, *size, dtype=floating_dtype(network), device="meta")
        plan = make_plan(network, injection, example)
        costs = count_costs(plan) if show is diagram is None else None
        latency = None
        if place is not None:
            with Console(stderr=True).status("Running it without and with SE blocks"):
                latency = measure_latency(plan, batch_size=batch_size or 1, device=place)
        if plot is not None:
            times = time_sites(plan, batch_size=batch_size or 1, device=place) if place else None
            plot_costs(plan, plot.expanduser(), times)
    console = Console()
    if diagram is not None and output is not None:
        print(f"The block before and after: {draw_block(plan, diagram, output.expanduser())}")
    elif costs is None:
        console.print(block_code(plan, show or ""))
    elif as_json:
        print(json.dumps(report_dict(model, plan, costs, latency), indent=2))
    else:
        print_report(console, model, plan, costs, latency, verbose=verbose)
