"""Writing files that are whole or not there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from se_inject.errors import ArgumentError


@contextlib.contextmanager
def atomic_write(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary file to write to, which becomes ``path`` at the end, flushed to the disk.

    Whatever happens on the way, ``path`` is the old file or the new one and never half of one.

    Raises:
        ArgumentError: ``path`` is a folder, its folder does not exist, or its name does not end in
            ``suffix``.
    """
    if suffix and path.suffix != suffix:
        raise ArgumentError(f"{path}: its name must end in {suffix}, or it will not be read.")
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise ArgumentError(f"{path}: there is no folder {path.parent}.")
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
    )
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())  # a temporary file is its owner's alone
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
