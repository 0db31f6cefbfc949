"""``se-inject finetune``, ``evaluate`` and ``predict``: parse, call, print."""

import importlib.util
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

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
from se_inject.finetune.settings import BNStats, Settings, Strategy, Train

_TRAINING, _MODEL, _MACHINE = "Training", "Network", "Machine"


def finetune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A timm name, torchvision/NAME, or module:callable.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="A folder of class folders (or of train/ and val/), torch/NAME of torchvision,"
            " hfds/NAME of Hugging Face, wds/FOLDER of WebDataset shards, or digits:"
            " scikit-learn's 1,797 handwritten digits."
        ),
    ] = "digits",
    data_dir: Annotated[
        str | None,
        typer.Option(help="Where torch/, hfds/ or wds/ data lie or go.", show_default="here"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The run folder.", show_default="runs/MODEL-DATA"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with a run that was stopped; the machine may be another.",
            show_default=False,
        ),
    ] = None,
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
    pretrained: Annotated[
        bool, typer.Option(help="Begin from the library's weights.", rich_help_panel=_MODEL)
    ] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Begin from these weights: a state dict, or a file of save_se.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs in all.", rich_help_panel=_TRAINING)
    ] = 10,
    warmup_epochs: Annotated[
        int,
        typer.Option(
            min=0,
            help="The first epochs, in which only SE blocks and head learn.",
            rich_help_panel=_TRAINING,
        ),
    ] = 2,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Images a step, of all processes together.", rich_help_panel=_TRAINING
        ),
    ] = 64,
    lr: Annotated[
        float,
        typer.Option(
            help="Peak learning rate of SE blocks and head (AdamW).", rich_help_panel=_TRAINING
        ),
    ] = 1e-3,
    base_lr_scale: Annotated[
        float,
        typer.Option(min=0, help="Share of that rate for the base.", rich_help_panel=_TRAINING),
    ] = 0.1,
    weight_decay: Annotated[
        float,
        typer.Option(min=0, help="Not on biases and norms.", rich_help_panel=_TRAINING),
    ] = 0.05,
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share.", rich_help_panel=_TRAINING)
    ] = 0.1,
    clip: Annotated[
        float,
        typer.Option(
            min=0, help="Largest norm of the gradient; 0: any.", rich_help_panel=_TRAINING
        ),
    ] = 1.0,
    train: Annotated[
        Train, typer.Option(help="What learns after the warm-up.", rich_help_panel=_TRAINING)
    ] = "all",
    bn_stats: Annotated[
        BNStats,
        typer.Option(
            help="BatchNorm statistics after the warm-up; auto: frozen in a pretrained base,"
            " moving in one that begins at random.",
            rich_help_panel=_TRAINING,
        ),
    ] = "auto",
    img_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of the images in pixels.",
            show_default="the model's own",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    val_split: Annotated[
        float,
        typer.Option(
            help="Share of each class to validate on, where the data have no val/.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.2,
    aa: Annotated[
        str | None,
        typer.Option(
            help="timm's augmentation, such as rand-m9-mstd0.5.",
            show_default="none",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    mixup: Annotated[
        float, typer.Option(min=0, help="Its alpha; 0: off.", rich_help_panel=_TRAINING)
    ] = 0.0,
    cutmix: Annotated[
        float, typer.Option(min=0, help="Its alpha; 0: off.", rich_help_panel=_TRAINING)
    ] = 0.0,
    ema: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Decay of an average of the weights, such as 0.999.",
            show_default="off",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first run.", rich_help_panel=_TRAINING)] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Repeat with so many seeds.", rich_help_panel=_TRAINING)
    ] = 1,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Also train the same network without SE: same batches, same head.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="As Lightning names it: 32-true, 16-mixed, ...",
            show_default="bf16-mixed on a GPU, else 32-true",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    devices: Annotated[
        str, typer.Option(help="How many GPUs or processes.", rich_help_panel=_MACHINE)
    ] = "auto",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.", rich_help_panel=_MACHINE)] = 1,
    strategy: Annotated[
        Strategy,
        typer.Option(
            help="Of several processes: ddp copies the network to each (as auto does), fsdp"
            " shards it.",
            rich_help_panel=_MACHINE,
        ),
    ] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Processes that load images, for each GPU.", rich_help_panel=_MACHINE
        ),
    ] = 2,
    compile_: Annotated[
        bool, typer.Option("--compile", help="torch.compile the network.", rich_help_panel=_MACHINE)
    ] = False,
) -> None:
    """Fine-tune MODEL with SE blocks, and with --control also without them.

    First only the SE blocks and a new head learn, the base frozen with its statistics; then all,
    the base at a smaller rate. The run folder has the best weights, metrics, curves and a summary.

    Examples:

    - `se-inject finetune resnet50 --data ./flowers`

    - `se-inject finetune resnet50 --data ./flowers --control --seeds 3`

    - `torchrun --nproc-per-node 4 -m se_inject finetune resnet50 --data ./flowers --devices 4`

    - `se-inject finetune --resume runs/resnet50-flowers`
    """
    if (model is None) == (resume is None):
        raise typer.BadParameter("give MODEL, or --resume RUN")
    _need_lightning()
    from se_inject.finetune import trainer as run

    console = Console(stderr=True)
    if resume is not None:
        given = {name for name in context.params if _is_given(context, name)} - {"resume"}
        if others := sorted(given - _ON_RESUME.keys()):
            raise typer.BadParameter(
                f"--resume goes on as {resume / run.CONFIG} says; only"
                f" {', '.join(_ON_RESUME.values())} may be others than before, not"
                f" {', '.join('--' + name.rstrip('_').replace('_', '-') for name in others)}"
            )
        values = {"devices": devices, "nodes": nodes, "strategy": strategy}
        values |= {"workers": workers}
        changes = {name: value for name, value in values.items() if name in given}
        summary = run.resume(resume, console, **changes)
        folder = resume
    else:
        assert model is not None
        settings = Settings(
            model=model,
            data=str(Path(data).resolve()) if Path(data).is_dir() else data,
            data_dir=None if data_dir is None else str(Path(data_dir).resolve()),
            r=parse_ratio(r),
            divisor=divisor,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            placement=placement,
            squeeze=squeeze,
            gate=gate,
            bias=bias,
            init=init,
            attention=attention,
            pretrained=pretrained,
            checkpoint=None if checkpoint is None else str(checkpoint.resolve()),
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            batch_size=batch_size,
            lr=lr,
            base_lr_scale=base_lr_scale,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            clip=clip,
            img_size=img_size,
            val_split=val_split,
            train=train,
            bn_stats=bn_stats,
            aa=aa,
            mixup=mixup,
            cutmix=cutmix,
            precision=precision,
            devices=devices,
            nodes=nodes,
            strategy=strategy,
            workers=workers,
            seed=seed,
            seeds=seeds,
            control=control,
            ema=ema,
            compile=compile_,
        )
        name = f"{model}-{Path(data).name}".replace("/", "-").replace(":", "-")
        folder = output or Path("runs") / name
        summary = run.start(settings, folder, console)
    if run.rank() == 0:
        _print_summary(summary, folder)


_ON_RESUME = {name: f"--{name}" for name in ("devices", "nodes", "strategy", "workers")}


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    table = Table("arm", "validation accuracy", "parameters", "GMACs", "seconds", box=None)
    for arm, row in summary["arms"].items():
        spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
        macs = "" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}"
        table.add_row(
            arm,
            f"{100 * row['mean']:.2f}{spread} %",
            f"{row['params']:,}",
            macs,
            f"{row['seconds']:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(summary["verdict"], highlight=False)
    console.print(f"Best weights, metrics, curves: {folder}", highlight=False, soft_wrap=True)


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="Other data with the same classes.", show_default="those of the run"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
) -> None:
    """Measure the best network of RUN: top-1, top-5, each class; confusion matrix in the folder."""
    _need_lightning()
    from se_inject.finetune import evaluate as use

    result = use.evaluate(use.load_run(run), run, data)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = Console()
    console.print(
        f"{result['images']} images: top-1 {100 * result['top1']:.2f} %,"
        f" top-5 {100 * result['top5']:.2f} %",
        highlight=False,
    )
    for name, accuracy in result["classes"].items():
        share = "no image" if accuracy is None else f"{100 * accuracy:6.2f} %"
        console.print(f"  {share}  {name}", highlight=False, markup=False)
    if result["unreadable"]:
        console.print(f"{len(result['unreadable'])} images could not be read.", highlight=False)
    console.print(f"Confusion matrix: {run / 'confusion.png'}, .csv", highlight=False)


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)
    ],
) -> None:
    """Ask the best network of RUN about images: the likeliest classes with their probabilities."""
    _need_lightning()
    from se_inject.finetune import evaluate as use

    trained = use.load_run(run)
    failed = 0
    for path in images:
        try:
            likely = use.predict(trained, path)
        except SEInjectError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in likely))
    if failed:
        raise typer.Exit(1)


def _need_lightning() -> None:
    """Raise an :class:`ArgumentError` where the extra is not installed; else make it quiet."""
    if importlib.util.find_spec("lightning") is None:
        raise ArgumentError("there is no lightning: pip install 'se-inject[finetune]'.")
    import lightning.pytorch  # noqa: F401  # sets the levels of its loggers

    # Tips, devices and its own deprecations; errors still come through.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
