"""What every export format says about itself."""

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

    ``write(model, path)`` writes the file, reads it back, and compares it with the model before the
    file is kept. It returns the Python expression that loads the file.
    """

    about: str  # a description for the help of the command line
    suffix: str  # the end of the name of such a file
    write: Callable[[nn.Module, Path], str]
    extra: str | None = None  # the optional dependency of se-inject that the format needs
    # The same for an optimised copy of the model. It also returns what was done. None means that
    # the format cannot do this.
    write_optimized: Callable[[nn.Module, Path], tuple[str, Optimization]] | None = None


def need_packages(*packages: str, extra: str) -> None:
    """Raise an :class:`ExportError` that says what to install if a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"there is no {package}: pip install 'se-inject[{extra}]'.")
