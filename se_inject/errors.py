"""The errors that a user can meet, and warnings that point at the user's own line.

The errors form one family, and each message says what to do.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

from se_inject.reasons import Skipped


class SEInjectError(Exception):
    """The base class of every error that se_inject raises on purpose.

    The message has one or two lines. It names the block or the argument, its value and what to do.
    """


class ArgumentError(SEInjectError, ValueError):
    """An argument has a value that cannot work (``r=0``, a glob that matches no block, ...)."""


class UnknownModelError(SEInjectError, LookupError):
    """No library knows the name of a model, or the model of that name cannot be built."""


class UnsupportedModelError(SEInjectError, TypeError):
    """The model cannot be edited as it is.

    It may be compiled, scripted or wrapped for distributed runs, or one of its blocks may refuse
    its SE block.
    """


class ForwardError(SEInjectError, RuntimeError):
    """The forward of the model failed on the example input, so nothing could be recorded."""


class BenchmarkError(SEInjectError, RuntimeError):
    """A forward cannot be timed, because it runs out of memory or needs another input."""


class CheckpointError(SEInjectError, ValueError):
    """A file cannot be loaded.

    It is damaged, another program or version wrote it, or it belongs to another base network.
    """


class ForeignFileError(CheckpointError):
    """The ``.safetensors`` file is intact, but save_se did not write it (a plain state dict)."""


class DataError(SEInjectError, ValueError):
    """The data cannot be used: it is empty, has only one class, or its parts do not fit together.

    The measurements of :mod:`se_inject.gates` also raise it where numbers are not finite.
    """


class TrainingError(SEInjectError, RuntimeError):
    """A training run cannot go on: its loss is not a number, memory ran out, or it was stopped."""


class ExportError(SEInjectError, RuntimeError):
    """The model cannot be written in a format, or the written model gives other outputs."""


class NoSiteError(SEInjectError):
    """The model has no place for an SE block, or no SE block where one is needed.

    When a plan finds no place, the message counts the reasons, and ``skipped`` holds the additions
    of the model with the reason for each, as ``Plan.skipped`` does. Otherwise ``skipped`` is empty.
    """

    def __init__(self, message: str, skipped: Sequence[Skipped] = ()) -> None:
        super().__init__(message)
        self.skipped = tuple(skipped)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, to be quoted as the reason in another message."""
    try:
        text = str(error)
    except Exception:  # the __str__ of a foreign error may fail itself
        text = ""
    return (text.strip().splitlines() or ["no message"])[0][:200]


def warn(message: str) -> None:
    """Warn at the line that called this package, however many calls lie between."""
    package = os.path.dirname(__file__) + os.sep
    frame, level = sys._getframe(), 1
    # A context manager of this package is entered by contextlib.
    while frame.f_code.co_filename.startswith((package, contextlib.__file__)) and frame.f_back:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
