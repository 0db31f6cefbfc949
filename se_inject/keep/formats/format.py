"""What every export format says of itself."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from se_inject.errors import ExportError
from se_inject.keep.deploy.optimize import Optimization


@dataclass(frozen=True)
class Format:
    """One way to write an injected model.

    ``write(model, path)`` writes the file, reads it back, compares it with the model before it is
    kept, and returns the Python expression that loads it.
    """

    about: str  # for the help of the command line
    suffix: str  # what the name of such a file ends in
    write: Callable[[nn.Module, Path], str]
    extra: str | None = None  # the optional dependency of se-inject that it needs
    # The same for an optimised copy of the model; also what was done. None: the format has none.
    write_optimized: Callable[[nn.Module, Path], tuple[str, Optimization]] | None = None


def need_packages(*packages: str, extra: str) -> None:
    """Raise an :class:`ExportError` that says what to install if a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"there is no {package}: pip install 'se-inject[{extra}]'.")
