"""An advisory lock that lets only one process write to a run folder, and a note of who holds it."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from se_inject.errors import ArgumentError
from se_inject.keep.atomic import atomic_write, process_lives, sweep

LOCK, HOLDER = ".lock", ".writer.json"

# The workers of a process that was killed hold its lock until they see that it is gone.
_SECONDS_OF_ORPHANS = 60.0


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a run folder, and delete what killed processes left in it.

    The system releases the lock of a process that ends, however it ends.

    Raises:
        ArgumentError: another process writes to the folder, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=_SECONDS_OF_ORPHANS if _holder_is_gone(folder) else 0)
    except Timeout:
        raise ArgumentError(
            f"{folder} is being written to by {_holder(folder)}. Wait until that ends, stop it,"
            " or give another --output."
        ) from None
    except OSError as error:
        raise ArgumentError(f"{folder} cannot be written ({error}).") from error
    try:
        for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            sweep(part, of_other_machines=True)
        with atomic_write(folder / HOLDER) as part:
            part.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}) + "\n")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder_of(folder: Path) -> tuple[int, str] | None:
    """The process and the machine of the writer, or None if they cannot be read."""
    try:
        found = json.loads((folder / HOLDER).read_text())
        return int(found["pid"]), str(found["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _holder(folder: Path) -> str:
    holder = _holder_of(folder)
    return "another process" if holder is None else f"process {holder[0]} on {holder[1]}"


def _holder_is_gone(folder: Path) -> bool:
    holder = _holder_of(folder)
    return holder is not None and holder[1] == platform.node() and not process_lives(holder[0])
