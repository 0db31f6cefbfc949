"""Tells whose code calls the tracer: frames of the user, of torch and of this package."""

import dis
import linecache
import os
import re
import sysconfig
import types

import torch
import torch.utils.checkpoint

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LONGEST_LINE = 60  # how much of a source line a reason shows, in characters
_PLANNING = os.path.dirname(__file__) + os.sep
_KERNELS = tuple(
    _TORCH + part for part in ("_refs", "_prims", "_decomp", "_meta_registrations", "_inductor")
)


def is_of_torch(frame: types.FrameType, *, kernels: bool = False) -> bool:
    """Whether a frame runs code of torch (or, with ``kernels``, one of its kernels in Python)."""
    return frame.f_code.co_filename.startswith(_KERNELS if kernels else _TORCH)


def is_of_planning(frame: types.FrameType) -> bool:
    """Whether a frame runs code of this folder, which copies, records and traces."""
    return frame.f_code.co_filename.startswith(_PLANNING)


def _is_the_users(filename: str) -> bool:
    """Whether a file does not belong to torch, to this package or to Python itself."""
    of_python = filename.startswith(_PYTHON) and not _INSTALLED.search(filename)
    return not filename.startswith((_TORCH, _HERE, "<frozen")) and not of_python


def place_of(frame: types.FrameType | None) -> str:
    """Where in the user's source a frame is: `` (net.py, line 12: if h > w:)``, or empty."""
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_the_users(name):
            return _place(name, frame.f_lineno)
        frame = frame.f_back
    return ""


def _place(filename: str, line: int) -> str:
    source = linecache.getline(filename, line).strip()
    if len(source) > _LONGEST_LINE:
        source = source[:_LONGEST_LINE] + "..."
    where = f"{os.path.basename(filename)}, line {line}"
    return f" ({where}: {source})" if source else f" ({where})"


def in_checkpoint(frame: types.FrameType | None) -> bool:
    """Whether ``torch.utils.checkpoint`` runs the code that the frame belongs to."""
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def place_of_error(error: BaseException) -> str:
    """Where in the user's source an error was raised."""
    place, step = "", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if _is_the_users(name):
            place = _place(name, step.tb_lineno)
        step = step.tb_next
    return place


def user_frame(frame: types.FrameType | None) -> types.FrameType | None:
    """The innermost frame that is not torch's."""
    while frame is not None and is_of_torch(frame):
        frame = frame.f_back
    return frame


def is_unpacked_next(frame: types.FrameType | None) -> bool:
    """Whether the frame unpacks at once what the function that it now calls returns."""
    if frame is None:
        return False
    after = [i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti]
    step = next((i for i in after if i.opname not in ("CACHE", "PRECALL", "CALL")), None)
    return step is not None and step.opname == "UNPACK_SEQUENCE"


def is_unpacked(frame: types.FrameType) -> bool:
    """Whether the frame unpacks the value at once: ``n, c, h, w = x.shape``."""
    return _opcode(frame) == "UNPACK_SEQUENCE"


def _opcode(frame: types.FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def is_statement(frame: types.FrameType) -> bool:
    """Whether the frame runs an operator that also assigns: ``x *= n``."""
    return _opcode(frame) == "BINARY_OP" and frame.f_code.co_code[frame.f_lasti + 1] >= 13
