"""Writes, finds and reads folders with ``se.safetensors``, ``config.json`` and a model card."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from se_inject.errors import ArgumentError, CheckpointError, first_line
from se_inject.keep.atomic import atomic_write
from se_inject.keep.hub.about import About
from se_inject.keep.hub.card import card_text
from se_inject.keep.hub.remote import download, is_on_hub, upload
from se_inject.keep.read import printable

WEIGHTS, CONFIG, CARD = "se.safetensors", "config.json", "README.md"
_LIBRARY = "se-inject"
_MOST_CHANNELS = 4096  # the most input channels; a hostile file might ask for a huge network
_LONGEST = 200  # the longest name, in characters
_LARGEST_FILE = 1_000_000  # the largest config.json, in bytes


def names_a_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path to write to means a folder, which it does if it ends in a slash."""
    return str(os.fspath(path)).endswith(("/", os.sep))


def write_folder(
    folder: Path, about: About, write_weights: Callable[[Path], None], repo: str | None
) -> None:
    """Write the three files, and put them on the Hub if ``repo`` is given.

    A card that was edited stays as it is.

    Raises:
        ArgumentError: such a folder cannot be made, or it belongs to somebody else.
        ExportError: the Hub does not take the folder. It is written on the disk all the same.
    """
    if not folder.parent.is_dir():
        raise ArgumentError(f"{folder}: there is no folder {folder.parent}.")
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} is a file, and no folder to write into.")
    config = folder / CONFIG
    if config.exists() and not _is_ours(config):
        raise ArgumentError(
            f"{config} is not of save_se (a run or another model?). Give a folder of its own."
        )
    text = card_text(about, f"hf-hub:{repo}" if repo else f"path/to/{folder.name}")
    with _made(folder):
        write_weights(folder / WEIGHTS)
    if _may_be_written(folder / CARD, config):
        with atomic_write(folder / CARD) as part:
            part.write_text(text, encoding="utf-8")
    said = {
        "library_name": _LIBRARY,
        "library_version": metadata.version("se-inject"),
        "base": about.base,
        "in_chans": about.in_chans,
        "num_classes": about.num_classes,
        "class_names": list(about.run.classes) if about.run else None,
        "card": _hash(text),
    }
    with atomic_write(config) as part:
        part.write_text(json.dumps(said, indent=2) + "\n")
    if repo is not None:
        upload(folder, repo, (WEIGHTS, CONFIG, CARD), card=CARD)


def _may_be_written(card: Path, config: Path) -> bool:
    """Whether there is no card yet, or only the one that ``config.json`` says we wrote."""
    if not card.exists():
        return True
    said = json.loads(config.read_text()).get("card") if config.exists() else None
    return bool(said == _hash(card.read_text(encoding="utf-8", errors="replace")))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and delete it again if what it was made for fails."""
    new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            folder.rmdir()
        raise


def _is_ours(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_text())["library_name"] == _LIBRARY)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def weights_file(source: str | os.PathLike[str]) -> Path:
    """The file of SE blocks that a file, a folder or ``hf-hub:user/repo`` stands for.

    Raises:
        CheckpointError: the Hub has no such file.
    """
    return _file_of(source, WEIGHTS)


def _file_of(source: str | os.PathLike[str], name: str) -> Path:
    text = str(os.fspath(source))
    if is_on_hub(text):
        return download(text, name)
    path = Path(text)
    try:
        return path / name if path.is_dir() else path
    except ValueError:  # the name has a NUL; whoever reads the file reports that
        return path


@dataclass(frozen=True)
class FolderSaid:
    """What ``config.json`` says."""

    base: str | None
    in_chans: int | None


def read_config(source: str | os.PathLike[str]) -> FolderSaid:
    """Read the ``config.json`` of a folder or repository. It may come from anybody.

    Raises:
        CheckpointError: there is none, it is damaged, or save_se did not write it.
    """
    path = _file_of(source, CONFIG)
    shown = printable(path)
    if path.name != CONFIG:
        raise CheckpointError(
            f"{shown} is not a folder of save_se. A file alone does not say what its base is: build"
            " the base and call load_se(base, path)."
        )
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ValueError("it is too large")
        data = json.loads(text)
        if data["library_name"] != _LIBRARY:
            raise ValueError(f"it is of {data['library_name']!r}")
        return FolderSaid(_base(data.get("base")), _channels(data.get("in_chans")))
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: there is no such file.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{shown} is damaged, or not of save_se ({printable(first_line(error))})."
        ) from error


def _base(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _LONGEST:
        raise ValueError("its base is no name")
    return value


def _channels(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not 1 <= value <= _MOST_CHANNELS):
        raise ValueError(f"in_chans is {value!r:.60}")
    return value
