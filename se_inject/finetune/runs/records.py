"""Reads what a run folder keeps (``arm.json``, ``summary.json``), and checks edited settings."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from se_inject.errors import ArgumentError, CheckpointError, first_line
from se_inject.finetune.options.config import CONFIG, to_dict
from se_inject.finetune.options.settings import ON_RESUME, Settings
from se_inject.finetune.training.machine import damaged, epochs_done, read_last

ARM, LAST, SUMMARY = "arm.json", "last.ckpt", "summary.json"

# These settings may be edited in the configuration of a run that has begun. They have no effect on
# what is learnt, or they say where the same images are now.
HARMLESS = (*ON_RESUME, "data", "data_dir")

_NUMBER = (int, float)
_OF_ARM: Mapping[str, Any] = {
    "arm": str,
    "seed": int,
    "val_acc": _NUMBER,
    "last_val_acc": _NUMBER,
    "params": int,
    "seconds": _NUMBER,
    "unreadable": list,
    "classes": list,
    "input_size": list,
    "history": list,
}
_OF_ROW = ("arm", "seed", "epoch", "train_loss", "val_loss", "val_acc")


def read_arm(path: Path) -> dict[str, Any]:
    """Read the results of one arm with one seed.

    Raises:
        CheckpointError: the file is damaged.
    """
    way_out = f"Remove it and --resume the run: the arm is read from its {LAST} again."
    found = _read(path, _OF_ARM, way_out)
    if not found["history"] or not all(
        isinstance(row, dict) and set(_OF_ROW) <= row.keys() for row in found["history"]
    ):
        raise CheckpointError(f"{path} is damaged (its history is no list of epochs). {way_out}")
    if not isinstance(found.get("settings", {}), dict):
        raise CheckpointError(f"{path} is damaged (it has no settings by name). {way_out}")
    return found


def epochs_of(arm: Mapping[str, Any]) -> int:
    """The number of epochs that an arm was to have. After an early stop its history has fewer."""
    settings = arm.get("settings") or {}  # older versions did not keep them
    return int(settings.get("epochs", len(arm["history"])))


def read_classes(folder: Path) -> tuple[str, ...]:
    """Read the classes of a finished run.

    Raises:
        ArgumentError: the run is not finished.
        CheckpointError: its summary is damaged.
    """
    path = folder / SUMMARY
    again = f"se-inject finetune --resume {folder}"
    if not path.exists():
        raise ArgumentError(f"{folder} is not finished. Go on with: {again}")
    way_out = f"This writes it again: {again}"
    classes = _read(path, {"classes": list}, way_out)["classes"]
    if len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path} is damaged (its classes are no list of names). {way_out}")
    return tuple(classes)


def _read(path: Path, fields: Mapping[str, Any], way_out: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no object of JSON")
        for name, kind in fields.items():
            if name not in found:
                raise ValueError(f"it has no {name}")
            if not isinstance(found[name], kind) or isinstance(found[name], bool):
                raise ValueError(f"{name} is {found[name]!r:.60}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}). {way_out}") from error
    return found


# --- edits between a stop and going on -----------------------------------------------------------


def check_edits(settings: Settings, folder: Path) -> None:
    """Refuse edited settings with which the rest of a run would not fit what is trained already.

    Older versions did not keep the settings beside the weights, so their arms are not checked.

    Raises:
        ArgumentError: a setting differs from what it was when the run began, or an arm has more
            epochs already than the settings ask for.
    """
    now = to_dict(settings)
    for path, done, begun in _begun(folder, settings.epochs):
        if done > settings.epochs:
            raise ArgumentError(
                f"--epochs {settings.epochs}: {path.parent} has {done} epochs already."
            )
        changed = [
            name
            for name, value in begun.items()
            if name in now and name not in (*HARMLESS, "epochs") and now[name] != value
        ]
        if {"seeds", "control"} & set(changed) and _grows(begun, now):
            changed = [name for name in changed if name not in ("seeds", "control")]
        if changed:
            edits = ", ".join(f"{name} {begun[name]!r} is now {now[name]!r}" for name in changed)
            raise ArgumentError(
                f"{folder / CONFIG} was edited after {path} was written: {edits}. Undo that,"
                " or begin a new run with another --output folder."
            )


def _begun(folder: Path, epochs: int) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """The file, the number of whole epochs and the settings of each arm that has begun."""
    for path in sorted((*folder.glob(ARM), *folder.glob(f"*/{ARM}"))):
        arm = read_arm(path)
        yield path, len(arm["history"]), arm.get("settings") or {}
    for path in sorted((*folder.glob(LAST), *folder.glob(f"*/{LAST}"))):
        try:
            done = epochs_done(path)
        except CheckpointError:
            beside = path.with_name(ARM)
            if beside.exists() and epochs_of(read_arm(beside)) >= epochs:
                continue  # this checkpoint is not needed any more
            raise
        try:
            begun = dict(read_last(path)["callbacks"]["RunFolder"].get("settings", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(path, error) from error
        yield path, done, begun


def _grows(begun: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether all arms that exist keep their folders, and new ones are only added."""

    def arms(of: Mapping[str, Any]) -> int:
        return int(of["seeds"]) * (1 + bool(of["control"]))

    several = min(arms(begun), arms(now)) > 1
    return several and now["seeds"] >= begun["seeds"] and now["control"] >= begun["control"]
