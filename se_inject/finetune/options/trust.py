"""Refuses to import code that a run folder names, because the folder may come from anybody."""

import importlib.util
import os
import sys
from pathlib import Path

from se_inject.errors import ArgumentError
from se_inject.finetune.options.config import CONFIG
from se_inject.models.names import is_code


def check_code(model: str, folder: Path, *, trusted: bool) -> None:
    """Refuse a run folder whose network is built by code that the user does not trust.

    Args:
        trusted: whether the user gave ``--trust-code``. Even then, code that lies in the run folder
            is never imported.

    Raises:
        ArgumentError: the configuration names code that must not be imported.
    """
    if not is_code(model):
        return
    if not trusted:
        raise ArgumentError(
            f"{folder / CONFIG} names code to import, {model!r}. If you trust it, add --trust-code."
        )
    if any(_is_inside(path, folder) for path in _places(model.partition(":")[0])):
        raise ArgumentError(
            f"{folder / CONFIG} names code in the run folder itself, {model!r}. Such code is"
            " never imported. Put the module elsewhere on the import path."
        )


def _places(module: str) -> list[Path]:
    """The paths that a module would be read from. Nothing is imported, not even its package."""
    top, _, rest = module.partition(".")
    sys.path.insert(0, os.getcwd())  # the real import does the same
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        spec = None
    finally:
        sys.path.pop(0)
    if spec is None:
        return []
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    origin = [Path(spec.origin)] if spec.origin and spec.has_location else []
    return [*origin, *folders, *(place.joinpath(*rest.split(".")) for place in folders)]


def _is_inside(path: Path, folder: Path) -> bool:
    root = folder.resolve()
    # A module is either a folder with its name or a file with its name and .py.
    return any(p.resolve().is_relative_to(root) for p in (path, path.with_suffix(".py")))


def printable(text: str) -> str:
    """Make a name safe for a terminal: control characters are written as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
