"""``se-inject prune``: remove SE blocks that hardly matter from the network of a run."""

import copy
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from se_inject.cli.lightning import TrustCode, need_lightning
from se_inject.cli.options import Only, expand
from se_inject.plan.injection import Injection


@expand
def prune(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
    ],
    max_change: Annotated[
        float,
        typer.Option(
            min=0,
            help="The largest change that is allowed in any output for any image, as a share of"
            " the largest output: 0.01 means 1 %.",
        ),
    ],
    injection: Annotated[Injection, Only("include", "exclude")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Measure the change on other data with the same classes.",
            show_default="those of the run",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file for the weights of the smaller network.",
            show_default="RUN/pruned.safetensors",
        ),
    ] = None,
    benchmark: Annotated[
        bool,
        typer.Option("--benchmark", help="Also measure the latency before and after the folding."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Fold the SE blocks of RUN that hardly matter into the layers before them.

    The gate of a folded block is replaced by its mean over the images that the run validated on.
    As many blocks are folded as --max-change allows, beginning with those whose gates vary least.
    The run stays as it is, and the smaller network is written into a file of its own.

    Examples:

    - `se-inject prune runs/resnet50-flowers --max-change 0.01 --benchmark`
    """
    need_lightning()
    run = run.expanduser()
    from se_inject.finetune.after import evaluate as use
    from se_inject.finetune.after import looked
    from se_inject.finetune.training.callbacks import save_network
    from se_inject.gates import prune_se
    from se_inject.report.saved import measure_savings

    trained = use.load_run(run, trust_code=trust_code)
    batches = looked.batches_of_run(trained, looked.split_of_run(trained, run, data))
    before = copy.deepcopy(trained.network)
    with Console(stderr=True).status("Trying how many SE blocks can go") as status:
        folding = prune_se(
            trained.network,
            batches,
            max_change=max_change,
            include=injection.include,
            exclude=injection.exclude,
        )
        _say(status, benchmark)
        savings = measure_savings(before, trained.network, benchmark=benchmark)
    path = output.expanduser() if output else run / "pruned.safetensors"
    # All tensors are saved, because folding changes some of the base, whatever the run has trained.
    save_network(trained.network, path, base_is_known=False)
    if as_json:
        data_of = {**folding.to_dict(), "savings": savings.to_dict(), "file": str(path)}
        print(json.dumps(data_of, indent=2))
        return
    console = Console()
    lines = [
        str(folding),
        *(f"  {name or '(model)'} stays: {why}" for name, why in folding.kept.items()),
    ]
    for line in (*lines, str(savings), f"The smaller network: {path}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _say(status: Status, benchmark: bool) -> None:
    if benchmark:
        status.update("Running it before and after")
