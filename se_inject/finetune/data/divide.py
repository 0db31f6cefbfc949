"""Divides the images of a new run: by the parts that the data have, or else class by class."""

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from se_inject.errors import DataError
from se_inject.finetune.data.folders import Folder
from se_inject.finetune.data.parts import Part, Split
from se_inject.finetune.data.sources import Source
from se_inject.finetune.options.settings import Settings
from se_inject.names import few, plural


def divide(sources: Mapping[str, Source], settings: Settings, *, whole: bool) -> Split:
    """Divide the images by the parts that the data have, or else by ``--val-split``.

    Args:
        whole: if the data have no validation part, validate on all images instead of a share.

    Raises:
        DataError: there are no images or only one class, or the classes of the parts do not fit
            together.
    """
    train, where = sources["train"], f"--data {settings.data}"
    if len(train) == 0:
        raise DataError(f"{where}: there are no images.")
    classes = train.classes
    if len(classes) < 2:
        raise DataError(
            f"{where}: there is only one class ({classes[0]}). Give a folder that has a folder for"
            " each class."
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
    """Divide indices into those for training and those for validation, the same ones every time.

    Validation gets this share of each class. But of two images or more it gets at least one, and
    training always keeps at least one.
    """
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
    """Warn of identical files that lie in two classes or in two parts."""
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
    """Groups of identical files, each file with its name, class and part."""
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
    """A hash of the first and the last bytes, which tells files of the same size apart quickly."""
    span = 1 << 16
    with path.open("rb") as file:
        start = file.read(span)
        file.seek(max(span, size - span))
        return hashlib.sha256(start + file.read(span)).digest()
