"""A whole run: its arms and seeds, its folder, and how it goes on after a stop."""

import contextlib
import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from se_inject.errors import ArgumentError, CheckpointError
from se_inject.finetune.data.parts import Split, limited, table_of
from se_inject.finetune.data.split import SPLIT, open_split, write_split
from se_inject.finetune.figures.pictures import curves
from se_inject.finetune.figures.results import summarize, write_rows
from se_inject.finetune.options.config import read_config, write_config
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.options.trust import check_code
from se_inject.finetune.runs.lock import only_writer
from se_inject.finetune.runs.records import ARM, LAST, SUMMARY, check_edits, epochs_of, read_arm
from se_inject.finetune.training.arm import Arm
from se_inject.finetune.training.machine import rank
from se_inject.finetune.training.tune import check_alone, find_settings
from se_inject.keep.atomic import atomic_write


def start(
    settings: Settings, folder: Path, console: Console, *, find: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Begin a run in a new folder, or in a folder that holds no run yet.

    Args:
        find: the settings, of lr and batch_size, that are found by trials before the run begins.

    Raises:
        ArgumentError: the settings cannot work together, or the folder cannot be written or holds
            a run already.
        DataError, UnknownModelError, CheckpointError, TrainingError: the data, the model, the
            weights or the training fail.
    """
    settings.check()
    # The number is fixed now, so that it stays the same when the run goes on with more epochs.
    settings = dataclasses.replace(settings, freeze_epochs=settings.frozen_epochs)
    if find:
        check_alone(settings)
    if rank() != 0:  # one of the other processes of torchrun; only the first one writes
        return _run(settings, folder, console, begun=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--output {folder} cannot be written ({error}).") from error
    with only_writer(folder):
        if any(folder.glob(f"**/{LAST}")) or any(folder.glob(f"**/{ARM}")):
            raise ArgumentError(
                f"{folder} holds a run already. --resume {folder} goes on with it, and another"
                " --output folder begins a new run."
            )
        if find:
            settings = find_settings(settings, find, folder, console)
        write_config(settings, folder)
        return _run(settings, folder, console, begun=False)


def resume(
    folder: Path, console: Console, *, trust_code: bool = False, **changes: Any
) -> dict[str, Any]:
    """Go on with a run from the last whole epoch of each of its arms.

    Args:
        trust_code: whether to import the ``module:callable`` that the configuration names.
        changes: settings that replace those of the run. Only ``epochs`` is kept in the run folder.
            The others (the machine and the loggers) hold for this command alone.

    Raises:
        ArgumentError: the folder has no run, or it names code and is not trusted, or another
            process writes to it, or an edit of its configuration changes what is learnt.
        CheckpointError: the files of the run are damaged.
    """
    check_code(read_config(folder).model, folder, trusted=trust_code)
    first = rank() == 0
    with only_writer(folder) if first else contextlib.nullcontext():
        kept = read_config(folder)
        settings = dataclasses.replace(kept, **changes)
        settings.check()
        check_edits(settings, folder)
        if first and settings.epochs != kept.epochs:
            write_config(dataclasses.replace(kept, epochs=settings.epochs), folder)
        return _run(settings, folder, console, begun=True)


def _run(settings: Settings, folder: Path, console: Console, *, begun: bool) -> dict[str, Any]:
    first = rank() == 0
    arms = [(arm, settings.seed + i) for i in range(settings.seeds) for arm in settings.arms]
    results = []
    split: Split | None = None
    for number, (arm, seed) in enumerate(arms, start=1):
        own = folder if len(arms) == 1 else folder / f"{arm}-{seed}"
        done = own / ARM
        if done.exists():
            result = read_arm(done)
            had = epochs_of(result)
            if had >= settings.epochs:
                results.append(result)
                continue
            if not (own / LAST).exists():
                raise CheckpointError(
                    f"{own / LAST} is missing, so --epochs {settings.epochs} cannot go on from"
                    f" epoch {had}."
                )
        own.mkdir(parents=True, exist_ok=True)
        if split is None:
            split = _split(settings, folder, console, begun=begun)
        results.append(
            Arm(settings, split, arm, seed, own, console, len(arms) - number).train(folder)
        )
        if first:
            with atomic_write(done) as part:
                part.write_text(json.dumps(results[-1], indent=2) + "\n")
    summary = summarize(results)
    if not first:
        return summary
    with atomic_write(folder / SUMMARY) as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    if len(arms) > 1:
        chosen_arm = settings.arms[0]
        best = max((r for r in results if r["arm"] == chosen_arm), key=lambda r: r["val_acc"])
        own = folder / f"{chosen_arm}-{best['seed']}"
        chosen = own / "best.safetensors"
        if not chosen.exists():
            raise CheckpointError(
                f"{chosen} is missing. Remove {own / ARM} and {own / LAST} to train this arm again."
            )
        with atomic_write(folder / "best.safetensors") as part:
            shutil.copyfile(chosen, part)
        write_rows(folder / "metrics.csv", [row for r in results for row in r["history"]])
    curves(
        [row for r in results for row in r["history"]],
        folder / "curves.png",
        frozen_epochs=settings.frozen_epochs if settings.train == "all" else 0,
        best={(r["arm"], r["seed"]): r.get("best_epoch") or 0 for r in results},
    )
    return summary


def _split(settings: Settings, folder: Path, console: Console, *, begun: bool) -> Split:
    """Divide the images into parts as the run folder says or, if it does not say, anew."""
    recorded = begun and (folder / SPLIT).exists()
    if begun and not recorded:
        warnings.warn(
            f"{folder} has no {SPLIT}, because an older version began it. If images came or went"
            " since then, other images are validated than before.",
            stacklevel=2,
        )
    split = open_split(settings, folder if recorded else None)
    if rank() == 0:
        if not recorded:
            write_split(split, folder)
        for line in table_of(limited(split, settings.limit)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return limited(split, settings.limit)
