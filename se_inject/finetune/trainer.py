"""One command: the arms and seeds of a run, its folder, and how it goes on after a stop."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from se_inject.errors import ArgumentError
from se_inject.finetune.arm import Arm
from se_inject.finetune.config import read_config, write_config
from se_inject.finetune.machine import rank
from se_inject.finetune.parts import Split, table_of
from se_inject.finetune.results import curves, summarize, write_rows
from se_inject.finetune.settings import Settings
from se_inject.finetune.split import SPLIT, open_split, write_split
from se_inject.finetune.trust import check_code
from se_inject.keep.atomic import atomic_write


def start(settings: Settings, folder: Path, console: Console) -> dict[str, Any]:
    """Begin a run in a new folder, or one that holds nothing of a run.

    Raises:
        ArgumentError: the settings cannot work, or the folder cannot be written or has a run.
        DataError, UnknownModelError, CheckpointError, TrainingError: as the parts raise them.
    """
    settings.check()
    # A run that goes on for longer keeps the epochs of its frozen base.
    settings = dataclasses.replace(settings, freeze_epochs=settings.frozen_epochs)
    if rank() != 0:  # torchrun's others: the first process writes
        return _run(settings, folder, console, begun=False)
    if any(folder.glob("**/last.ckpt")) or any(folder.glob("**/arm.json")):
        raise ArgumentError(
            f"{folder} holds a run already: --resume {folder} goes on with it, --output another"
            " folder begins anew."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(settings, folder)
    except OSError as error:
        raise ArgumentError(f"--output {folder} cannot be written ({error}).") from error
    return _run(settings, folder, console, begun=False)


def resume(
    folder: Path, console: Console, *, trust_code: bool = False, **machine: Any
) -> dict[str, Any]:
    """Go on with a run from the last whole epoch of each of its arms.

    Args:
        trust_code: import the ``module:callable`` that the configuration names.
        machine: settings that may differ from those of the run: devices, nodes, strategy, workers.

    Raises:
        ArgumentError: the folder has no run, or names code and is not trusted.
    """
    settings = dataclasses.replace(read_config(folder), **machine)
    check_code(settings.model, folder, trusted=trust_code)
    settings.check()
    return _run(settings, folder, console, begun=True)


def _run(settings: Settings, folder: Path, console: Console, *, begun: bool) -> dict[str, Any]:
    first = rank() == 0
    arms = [
        (arm, settings.seed + i)
        for i in range(settings.seeds)
        for arm in (("se", "control") if settings.control else ("se",))
    ]
    results = []
    split: Split | None = None
    for arm, seed in arms:
        own = folder if len(arms) == 1 else folder / f"{arm}-{seed}"
        done = own / "arm.json"
        if done.exists():
            results.append(json.loads(done.read_text()))
            continue
        own.mkdir(parents=True, exist_ok=True)
        if split is None:
            split = _split(settings, folder, console, begun=begun)
        results.append(Arm(settings, split, arm, seed, own, console).train(folder))
        if first:
            with atomic_write(done) as part:
                part.write_text(json.dumps(results[-1], indent=2) + "\n")
    summary = summarize(results)
    if not first:
        return summary
    with atomic_write(folder / "summary.json") as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    if len(arms) > 1:
        best = max((r for r in results if r["arm"] == "se"), key=lambda r: r["val_acc"])
        own = folder / f"se-{best['seed']}"
        shutil.copyfile(own / "best.safetensors", folder / "best.safetensors")
        write_rows(folder / "metrics.csv", [row for r in results for row in r["history"]])
    curves([row for r in results for row in r["history"]], folder / "curves.png")
    return summary


def _split(settings: Settings, folder: Path, console: Console, *, begun: bool) -> Split:
    """Which images are for what: as the run folder says, else as they are divided now."""
    recorded = begun and (folder / SPLIT).exists()
    if begun and not recorded:
        warnings.warn(
            f"{folder} has no {SPLIT}, as runs of older versions: if images came or went since it"
            " began, others are validated than before.",
            stacklevel=2,
        )
    split = open_split(settings, folder if recorded else None)
    if rank() == 0:
        if not recorded:
            write_split(split, folder)
        for line in table_of(split):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return split
