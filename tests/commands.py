"""``se-inject ARGS`` in the process of the tests: a process of its own takes seconds to begin."""

import contextlib
import io
import os
import subprocess
import sys
import warnings
from unittest import mock

from se_inject.cli import app


def command(*args: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """What a command ends with and prints, 80 columns wide.

    Warnings are printed as a user sees them, and are not errors of the test.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "80", **(env or {})}),
        mock.patch.object(sys, "argv", ["se-inject", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.resetwarnings()
        for category in (DeprecationWarning, FutureWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        try:
            app.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
