"""``split.csv`` of a run folder says which images are to train, to validate and to test.

A run that goes on or is evaluated uses that list, and never divides the images anew. If a file was
added in between, a new division would validate on images that the network was trained on.
"""

import csv
import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from se_inject.errors import DataError
from se_inject.finetune.data.divide import divide
from se_inject.finetune.data.parts import Part, Split
from se_inject.finetune.data.sources import Source, open_sources
from se_inject.finetune.options.settings import Settings
from se_inject.keep.atomic import atomic_write
from se_inject.names import few, plural

SPLIT, CLASSES = "split.csv", "classes.json"


def open_split(settings: Settings, run: Path | None = None, *, whole: bool = False) -> Split:
    """Open the images of a run, divided as its folder says or, if it does not say, divided now.

    Args:
        run: the folder of a run that has begun.
        whole: if the data have no validation part, validate on all images instead of a share.

    Raises:
        DataError: there are no images or only one class, or the classes of the parts do not fit
            together, or the listed images do not exist.
    """
    sources = open_sources(settings)
    if run is not None and (run / SPLIT).exists():
        return _recorded(sources, run, settings)
    return divide(sources, settings, whole=whole)


def write_split(split: Split, run: Path) -> None:
    with atomic_write(run / CLASSES) as part:
        part.write_text(json.dumps(split.classes, indent=2) + "\n")
    with (
        atomic_write(run / SPLIT) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows(split.rows())


# --- the division of a run that has begun --------------------------------------------------------


def _recorded(sources: Mapping[str, Source], run: Path, settings: Settings) -> Split:
    classes, rows = _read(run)
    now = {
        name: (source, i, source.classes[source.labels[i]])
        for source in sources.values()
        for i, name in enumerate(source.names)
    }
    gone, changed = [], []
    found: dict[str, list[tuple[Source, int, int]]] = {}
    for name, label, part in rows:
        if name not in now:
            gone.append(name)
            continue
        source, index, label_now = now[name]
        if label_now != label:
            changed.append(name)
            continue
        found.setdefault(part, []).append((source, index, classes.index(label)))
    recorded = {name for name, _, _ in rows}
    came = [name for name in now if name not in recorded]
    # A file that was moved into the folder of another class is found by its name.
    by_file = defaultdict(list)
    for name in came:
        by_file[PurePosixPath(name).name].append(name)
    moved = {
        name: new
        for name in gone
        if (new := next((n for n in by_file[PurePosixPath(name).name] if _moved(n, name)), ""))
    }
    changed += [f"{name} (now {new})" for name, new in moved.items()]
    gone = [name for name in gone if name not in moved]
    came = [name for name in came if name not in set(moved.values())]
    _warn_of_changes(came, gone, changed, run)
    parts = {}
    for part, images in found.items():
        source = images[0][0]
        own = [(i, label) for s, i, label in images if s is source]
        parts[part] = Part(source, [i for i, _ in own], [label for _, label in own])
    if missing := [part for part in ("train", "val") if part not in parts]:
        raise DataError(
            f"--data {settings.data}: none of the images that {run / SPLIT} lists for"
            f" {missing[0]} exists."
        )
    return Split(classes, parts)


def trained_names(run: Path) -> set[str]:
    """The names of the images that a run was trained on. The set is empty if it does not say."""
    if not (run / SPLIT).exists():
        return set()
    return {name for name, _, part in _read(run)[1] if part == "train"}


def _read(run: Path) -> tuple[tuple[str, ...], list[tuple[str, str, str]]]:
    try:
        classes = tuple(map(str, json.loads((run / CLASSES).read_text())))
        with (run / SPLIT).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [(r["path"], r["label"], r["split"]) for r in csv.DictReader(file)]
        if not rows or not {label for _, label, _ in rows} <= set(classes):
            raise ValueError("its classes are not those of the run")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{run / SPLIT} or {CLASSES} is damaged ({error}): which images were trained on is not"
            " known. Begin a new run with another --output folder."
        ) from error
    return classes, rows


def _moved(new: str, old: str) -> bool:
    """Whether two paths differ in the name of exactly one folder."""
    a, b = PurePosixPath(new).parts, PurePosixPath(old).parts
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


def _warn_of_changes(
    came: Sequence[str], gone: Sequence[str], changed: Sequence[str], run: Path
) -> None:
    for names, what in (
        (came, "new since the run began, and left out"),
        (gone, "gone since the run began"),
        (changed, "in another class since the run began, and left out"),
    ):
        if names:
            count = plural(len(names), "image")
            warnings.warn(f"{run / SPLIT}: {count} {what}: {few(names)}.", stacklevel=4)
