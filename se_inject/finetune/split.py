"""Which image is trained on, validated on or kept for the test: ``split.csv`` of a run folder.

A run that goes on, and a run that is evaluated, use that list and never divide the images anew: a
file that came in between would give others to validate on than those that were not trained on.
"""

import csv
import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from se_inject.errors import DataError
from se_inject.finetune.folders import Folder
from se_inject.finetune.settings import Settings
from se_inject.finetune.sources import Source, open_sources
from se_inject.finetune.trust import printable
from se_inject.keep.atomic import atomic_write
from se_inject.names import few, plural

SPLIT, CLASSES = "split.csv", "classes.json"


@dataclass(frozen=True)
class Part:
    """Some images of a source, each with the index of its class in the run."""

    source: Source
    indices: Sequence[int]
    labels: Sequence[int]

    @property
    def names(self) -> list[str]:
        return [self.source.names[i] for i in self.indices]


@dataclass(frozen=True)
class Split:
    """The images of a run: ``parts`` has train, val and, where the data have one, test."""

    classes: tuple[str, ...]
    parts: Mapping[str, Part]

    def counts(self) -> dict[str, list[int]]:
        """How many images of each class each part has."""
        found = {name: Counter(part.labels) for name, part in self.parts.items()}
        return {name: [c[i] for i in range(len(self.classes))] for name, c in found.items()}

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, class and part of each image."""
        for name, part in self.parts.items():
            for image, label in zip(part.names, part.labels, strict=True):
                yield image, self.classes[label], name


def open_split(settings: Settings, run: Path | None = None, *, whole: bool = False) -> Split:
    """The images of a run, as its folder says or, where it says nothing, divided now.

    Args:
        run: the folder of a run that has begun.
        whole: validate on all images where there is no validation part, instead of a share.

    Raises:
        DataError: there are no images, one class only, or training and validation do not fit.
    """
    sources = open_sources(settings)
    if run is not None and (run / SPLIT).exists():
        return _recorded(sources, run, settings)
    return _divided(sources, settings, whole)


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


# --- a new division ------------------------------------------------------------------------------


def _divided(sources: Mapping[str, Source], settings: Settings, whole: bool) -> Split:
    train, where = sources["train"], f"--data {settings.data}"
    if len(train) == 0:
        raise DataError(f"{where}: there are no images.")
    classes = train.classes
    if len(classes) < 2:
        raise DataError(
            f"{where}: one class only ({classes[0]}); give a folder that has a folder for each"
            " class."
        )
    parts = {"train": _all_of(train, classes, "training")}
    if "val" in sources:
        val = sources["val"]
        parts["val"] = _all_of(val, classes, "validation")
        if missing := sorted(set(classes) - set(val.classes)):
            raise DataError(
                f"the validation set lacks classes of the training set: {', '.join(missing[:3])}."
                " Add images, or leave out val/ and use --val-split."
            )
    else:
        ours, theirs = split(train.labels, settings.val_split)
        if whole:
            theirs = list(range(len(train)))
        for name, indices in (("train", ours), ("val", theirs)):
            parts[name] = Part(train, indices, [train.labels[i] for i in indices])
    if not parts["val"].indices:
        raise DataError(
            f"{where}: no image is left to validate on. Raise --val-split or add images."
        )
    if "test" in sources:
        parts["test"] = _all_of(sources["test"], classes, "test")
    result = Split(classes, parts)
    if not whole:
        _warn_of_gaps(result)
        _warn_of_copies(result)
    return result


def _all_of(source: Source, classes: Sequence[str], kind: str) -> Part:
    if unknown := sorted(set(source.classes) - set(classes)):
        raise DataError(
            f"the {kind} set has classes that are not in the training set:"
            f" {', '.join(unknown[:3])}."
        )
    index = [classes.index(name) for name in source.classes]
    return Part(source, range(len(source)), [index[label] for label in source.labels])


def split(labels: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Indices for training and validation, the same share of each class, always the same ones."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    counts = Counter(labels)
    wanted = {
        label: min(count - 1, max(1, round(count * share))) for label, count in counts.items()
    }
    taken: Counter[int] = Counter()
    train, val = [], []
    for index in order:
        label = labels[index]
        if taken[label] < wanted[label]:
            taken[label] += 1
            val.append(index)
        else:
            train.append(index)
    return sorted(train), sorted(val)


def _warn_of_gaps(result: Split) -> None:
    for part, counts in result.counts().items():
        empty = [name for name, count in zip(result.classes, counts, strict=True) if not count]
        if empty:
            warnings.warn(f"there is no image of {few(empty)} in the {part} part.", stacklevel=4)


def _warn_of_copies(result: Split) -> None:
    """Say which files are the same in two classes or in two parts."""
    across_classes, across_parts = [], []
    for group in _copies(result):
        images = [name for name, _, _ in group]
        if len({label for _, label, _ in group}) > 1:
            across_classes.append(images)
        elif len({part for _, _, part in group}) > 1:
            across_parts.append(images)
    for groups, what in ((across_classes, "two classes"), (across_parts, "two parts")):
        if groups:
            warnings.warn(
                f"{plural(len(groups), 'file')} in {what} at once, such as"
                f" {groups[0][0]} = {groups[0][1]}.",
                stacklevel=4,
            )


def _copies(result: Split) -> Iterator[list[tuple[str, str, str]]]:
    """Groups of files that are the same: name, class and part of each."""
    by_size: dict[int, list[tuple[str, str, str]]] = defaultdict(list)
    folders = [p.source for p in result.parts.values() if isinstance(p.source, Folder)]
    if not folders:
        return
    root = folders[0].root
    for row in result.rows():
        by_size[(root / row[0]).stat().st_size].append(row)
    for size, rows in by_size.items():
        if len(rows) > 1:
            same: dict[bytes, list[tuple[str, str, str]]] = defaultdict(list)
            for row in rows:
                same[_ends_of(root / row[0], size)].append(row)
            yield from (group for group in same.values() if len(group) > 1)


def _ends_of(path: Path, size: int) -> bytes:
    """A hash of the first and the last bytes: enough for pictures of one size, and soon read."""
    span = 1 << 16
    with path.open("rb") as file:
        start = file.read(span)
        file.seek(max(span, size - span))
        return hashlib.sha256(start + file.read(span)).digest()


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
    # A file that was moved into another class has another path now.
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
            f"--data {settings.data}: none of the images that {run / SPLIT} has for"
            f" {missing[0]} is there."
        )
    return Split(classes, parts)


def trained_names(run: Path) -> set[str]:
    """The names of the images that a run is or was trained on; none where it does not say."""
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
            " known. Begin anew with --output another folder."
        ) from error
    return classes, rows


def _moved(new: str, old: str) -> bool:
    """Whether two paths differ in one folder alone."""
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


# --- what is said of it --------------------------------------------------------------------------


def table_of(result: Split) -> list[str]:
    """The images of each class in each part, in lines; the first and last few of many classes."""
    counts, total = result.counts(), len(result.classes)
    shown = [*range(total)] if total <= 12 else [*range(5), -1, *range(total - 5, total)]
    rows = [["class", *counts]]
    for i in shown:
        numbers = [f"{part[i]:,}" for part in counts.values()]
        rows.append(
            ["...", *("" for _ in counts)] if i < 0 else [printable(result.classes[i]), *numbers]
        )
    rows.append([f"{total} classes", *(f"{sum(part):,}" for part in counts.values())])
    width = min(40, max(len(row[0]) for row in rows))
    return [
        "  ".join([row[0][:width].ljust(width), *(cell.rjust(7) for cell in row[1:])])
        for row in rows
    ]
