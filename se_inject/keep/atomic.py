"""Writes files that are either whole or not there."""

import contextlib
import os
import platform
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from se_inject.errors import ArgumentError

# The name of every temporary file begins with the machine, because others may share the disk, and
# the id of the process. It does not contain the name of the file itself, so that a name of 255
# bytes works.
_ANY_PREFIX = ".se-inject-"
_PREFIX = f"{_ANY_PREFIX}{zlib.crc32(platform.node().encode()):08x}-"

# Temporary files end in .part, so that no glob for finished files (*.safetensors) finds them. Only
# these suffixes stay at the end of the name, because libraries tell the format by them.
_TOLD_BY_SUFFIX = (".onnx", ".pdf", ".png", ".pt2", ".svg")


@contextlib.contextmanager
def atomic_write(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary file to write to. At the end it is flushed to the disk as ``path``.

    Whatever happens on the way, ``path`` is the old file or the new one and never half of one. The
    new file has the mode of the old one, and its owner if the system allows that. A symbolic link
    stays, and the file that it points to is replaced.

    Raises:
        ArgumentError: ``path`` exists but is not a regular file, its folder does not exist, or its
            name does not end in ``suffix``.
    """
    if suffix and path.suffix != suffix:
        raise ArgumentError(f"{path}: its name must end in {suffix}, or it will not be read.")
    target, old = _target(path)
    sweep(target.parent)
    descriptor, name = tempfile.mkstemp(
        dir=target.parent,
        prefix=f"{_PREFIX}{os.getpid()}-",
        suffix=path.suffix if path.suffix in _TOLD_BY_SUFFIX else ".part",
    )
    part = Path(name)
    try:
        os.close(descriptor)
        yield part
        _flush(part)
        _take_mode_and_owner(part, old)
        part.replace(target)
        _flush(target.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """The file to replace, behind all symbolic links, and its present state."""
    try:
        target = Path(os.path.realpath(path))
        old = target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        old = None
    except (OSError, ValueError) as error:  # the name is too long or has a NUL, or links circle
        raise ArgumentError(f"{str(path)!r} cannot be a file here ({error}).") from error
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise ArgumentError(f"{path} is a folder; give the name of a file.")
    if old is not None and stat.S_ISLNK(old.st_mode):
        raise ArgumentError(f"{path} is a symbolic link that leads back to itself.")
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise ArgumentError(f"{path} is no regular file (a device or a pipe); give another name.")
    if not target.parent.is_dir():
        raise ArgumentError(f"{path}: there is no folder {path.parent}.")
    return target, old


def _take_mode_and_owner(part: Path, old: os.stat_result | None) -> None:
    if old is None:
        part.chmod(0o666 & ~_umask())  # A temporary file is readable by its owner alone.
        return
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(OSError):  # Only root may give a file away.
            os.chown(part, old.st_uid, old.st_gid)
    part.chmod(stat.S_IMODE(old.st_mode))


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Not every system can flush folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sweep(folder: Path, *, of_other_machines: bool = False) -> None:
    """Delete the temporary files of processes that were killed.

    Args:
        of_other_machines: whether to delete the files of other machines too. Nobody can ask here
            whether the processes there still run.
    """
    for part in folder.glob(f"{_ANY_PREFIX}*"):
        dead = of_other_machines
        if part.name.startswith(_PREFIX):
            owner = part.name.removeprefix(_PREFIX).partition("-")[0]
            dead = owner.isdecimal() and not process_lives(int(owner))
        if dead:
            with contextlib.suppress(OSError):
                part.unlink()


def process_lives(process: int) -> bool:
    """Whether this machine has a process with that number."""
    if os.name != "posix":
        return True  # On such a system signal 0 would end the process.
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
