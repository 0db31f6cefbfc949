"""``FILE.csv`` with the columns path and label, and optionally split."""

import csv
from collections.abc import Mapping
from pathlib import Path

from se_inject.errors import DataError
from se_inject.finetune.data.folders import PARTS, Folder
from se_inject.names import few, plural


def open_table(path: Path) -> Mapping[str, Folder]:
    """Open the images that a table lists. Their paths are relative to the folder of the table.

    Raises:
        DataError: the table cannot be read, has other columns, has no training images, or has a
            row with a missing file, a repeated file or an unknown split.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            columns = table.fieldnames or []
            rows = list(table)
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    if not {"path", "label"} <= set(columns):
        raise DataError(
            f"{path}: its first line must name the columns path,label or path,label,split, not"
            f" {','.join(columns)}."
        )
    found: dict[str, list[tuple[str, str]]] = {}
    missing, seen = [], set()
    for number, row in enumerate(rows, start=2):
        name, label = (row["path"] or "").strip(), (row["label"] or "").strip()
        if not name or not label:
            raise DataError(f"{path}, line {number}: it has no path or no label.")
        if name in seen:
            raise DataError(f"{path}, line {number}: {name} is listed twice.")
        seen.add(name)
        part = _part((row.get("split") or "").strip(), path, number)
        if not (path.parent / name).is_file():
            missing.append(name)
        found.setdefault(part, []).append((label, name))
    if missing:
        raise DataError(f"{path}: {plural(len(missing), 'file')} cannot be found: {few(missing)}.")
    if "train" not in found and found:
        raise DataError(
            f"{path}: no image is in the split train. Its splits are {', '.join(found)}."
        )
    return {part: Folder(path.parent, found[part]) for part in PARTS if part in found} or {
        "train": Folder(path.parent, [])
    }


def _part(word: str, path: Path, line: int) -> str:
    for part, words in PARTS.items():
        if word.lower() in words or (part == "train" and not word):
            return part
    raise DataError(f"{path}, line {line}: the split {word!r} is not one of train, val and test.")
