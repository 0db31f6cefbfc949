"""The errors a user can meet: one family, each message says what to do."""

from collections.abc import Sequence

from se_inject.reasons import Skipped


class SEInjectError(Exception):
    """Base of every error that se_inject raises on purpose.

    The message names the block or argument, the value it got and what to do, in one or two lines.
    """


class ArgumentError(SEInjectError, ValueError):
    """An argument has a value that cannot work (``r=0``, a glob that matches no block, ...)."""


class UnknownModelError(SEInjectError, LookupError):
    """A model name on the command line that no library knows, or that cannot be built."""


class UnsupportedModelError(SEInjectError, TypeError):
    """A model that cannot be edited as it is: compiled, scripted, wrapped for distributed runs."""


class ForwardError(SEInjectError, RuntimeError):
    """The forward of the model failed on the example input, so nothing could be recorded."""


class BenchmarkError(SEInjectError, RuntimeError):
    """A forward that cannot be timed: it runs out of memory, or wants another input."""


class CheckpointError(SEInjectError, ValueError):
    """A file that cannot be loaded: damaged, foreign, of another version or for another base."""


class ForeignFileError(CheckpointError):
    """A whole ``.safetensors`` file that save_se did not write, such as a plain state dict."""


class DataError(SEInjectError, ValueError):
    """A data set that cannot be trained on: empty, one class, parts that do not fit together."""


class TrainingError(SEInjectError, RuntimeError):
    """A training run that cannot go on: a loss that is no number, no memory, a stop."""


class ExportError(SEInjectError, RuntimeError):
    """A model that cannot be written in a format, or comes out of it with other outputs."""


class NoSiteError(SEInjectError):
    """No residual addition of the model can take an SE block; the message counts the reasons.

    ``skipped`` has the additions of the model, each with its reason, as in ``Plan.skipped``.
    """

    def __init__(self, message: str, skipped: Sequence[Skipped] = ()) -> None:
        super().__init__(message)
        self.skipped = tuple(skipped)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a reason inside another message."""
    try:
        text = str(error)
    except Exception:  # a foreign error whose __str__ fails itself
        text = ""
    return (text.strip().splitlines() or ["no message"])[0][:200]
