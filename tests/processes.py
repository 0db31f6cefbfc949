"""Processes of their own, forked from one that has imported torch, timm, Lightning and se_inject.

Each of these imports takes seconds, so a test that needs another process, but not one that begins
with nothing imported, takes one from here. The first test that asks for one starts the server.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["timm", "lightning.pytorch", "se_inject.cli.app", "se_inject.finetune.runs.trainer"]
)


def _execute(
    program: str, arguments: tuple[str, ...], env: dict[str, str], files: list[str]
) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    multiprocessing.set_start_method(None, force=True)  # that of the platform, not a fork server
    os.environ.clear()  # the server has what the first test that asked for it had
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def started(program: str, *arguments: str) -> BaseProcess:
    """A process that runs a program, as ``python -c PROGRAM ARGUMENTS`` does."""
    return _start(program, arguments, {}, [])


def _start(
    program: str, arguments: tuple[str, ...], env: dict[str, str], files: list[str]
) -> BaseProcess:
    process = CONTEXT.Process(
        target=_execute, args=(program, arguments, {**os.environ, **env}, files)
    )
    process.start()
    return process


def ended(
    program: str, *arguments: str, env: dict[str, str] | None = None, stdout: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """What the program of such a process ends with and prints; ``stdout`` may be a file."""
    with tempfile.TemporaryDirectory() as folder:
        files = [stdout or f"{folder}/stdout", f"{folder}/stderr"]
        process = _start(program, arguments, env or {}, files)
        process.join()
        out = "" if stdout else Path(files[0]).read_text()
        err = Path(files[1]).read_text()
    assert process.exitcode is not None
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)
