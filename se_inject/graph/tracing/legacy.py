"""Sees tensors that old code makes by types: ``torch.Tensor(n, c)``, ``torch.FloatTensor(n)``.

No mode of torch sees such a call. The types themselves cannot be replaced, because others use them
with ``isinstance``. So the name ``torch`` in the module of the forward is replaced by a stand-in.
Where such a type is called, the stand-in returns a function. In every other place and thread it
returns torch's own attribute.
"""

import dis
import functools
import sys
import types
from typing import Any

import torch

from se_inject.graph.thread import THREAD
from se_inject.graph.tracing.patches import Replacement

_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
LEGACY_TYPES = frozenset(f"{kind}Tensor" for kind in _KINDS)


class _Torch(types.ModuleType):
    """The module ``torch`` as the traced forward sees it."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        tracer = THREAD.running()
        if tracer is None or (name != "Tensor" and name not in LEGACY_TYPES):
            return value
        if not _is_called(sys._getframe(1)):
            return value
        return functools.partial(_made, tracer, value)


def _made(tracer: Any, kind: Any, *args: Any, **kwargs: Any) -> Any:
    return tracer.apply(kind, args, kwargs)


def _is_called(frame: types.FrameType) -> bool:
    """Whether the attribute that the frame reads is called.

    The next instruction that uses the attribute begins at the same place of the source. It may be a
    call, or it may read another attribute (``torch.Tensor.add``).
    """
    after = [i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti]
    start = after[0].positions
    if start is None or start.lineno is None:
        return False
    same = (
        i.opname
        for i in after[1:]
        if i.positions is not None
        and (i.positions.lineno, i.positions.col_offset) == (start.lineno, start.col_offset)
        and i.opname not in ("CACHE", "PRECALL")
    )
    return next(same, "") in ("CALL", "CALL_KW", "CALL_FUNCTION_EX")


def replacements(forward: Any) -> list[Replacement]:
    """The stand-ins for torch in the module in which a forward is written."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    space = getattr(forward, "__globals__", {})
    if space.get("__name__", "").startswith("torch."):
        return []
    stand_in = _Torch("torch")
    return [Replacement(space, name, stand_in) for name, v in list(space.items()) if v is torch]
