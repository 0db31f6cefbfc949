"""The command line, built with Typer: it collects the commands and reports their errors.

Tables go to stdout, and warnings and errors go to stderr. The exit status is 0 when a command is
done, 1 after an error (a message of one or two lines), and 2 for wrong usage.
"""

import io
import shutil
import sys
import warnings
from typing import Annotated, Any, Literal, NoReturn

import typer
import typer.core

from se_inject.cli.evaluate import evaluate
from se_inject.cli.export import export
from se_inject.cli.finetune import finetune
from se_inject.cli.gates import gates
from se_inject.cli.page import page
from se_inject.cli.predict import predict
from se_inject.cli.prune import prune
from se_inject.cli.report import report
from se_inject.cli.zoo import zoo
from se_inject.errors import SEInjectError

_MARKUP: Literal["markdown"] = "markdown"  # the markup of the help texts
_NARROW = 70  # columns; on a narrower terminal the help is a plain list


class _DefaultReport(typer.core.TyperGroup):
    """Makes ``se-inject MODEL`` short for ``se-inject report MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["report", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultReport,
    no_args_is_help=True,
    rich_markup_mode=_MARKUP,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog="`se-inject MODEL` is short for `se-inject report MODEL`, as in"
    " `se-inject resnet50 --r 16`. Its options are shown by `se-inject report --help`.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from se_inject import __version__

        print(f"se-inject {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Squeeze-and-Excitation for a network you already have."""


for _command in (report, zoo, export, finetune, evaluate, predict, gates, prune, page):
    app.command()(_command)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point of the ``se-inject`` script."""
    warnings.showwarning = _warn
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows "?" for "×"
            stream.reconfigure(errors="replace")
    # On a narrow terminal the frames that rich draws around the help cut the names of options.
    narrow = shutil.get_terminal_size().columns < _NARROW
    app.rich_markup_mode = None if narrow else _MARKUP
    try:
        app()
        sys.stdout.flush()
    except SEInjectError as error:
        _fail(str(error))
    except Warning as warning:  # python -W error turns warnings into errors
        _fail(f"{warning} (a warning, which -W error makes an error)")
    except OSError as error:  # such as a full disk or a closed pipe
        _fail(f"cannot write: {error}")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
