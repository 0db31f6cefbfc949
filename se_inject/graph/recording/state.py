"""What a forward changes on its own module, from the attributes before and after a call."""

import functools
from typing import Any

from torch import nn


def state_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, including its parameters, buffers and children.

    The values of cached properties are left out, because reading one for the first time changes no
    state.
    """
    state = {**vars(module), **module._parameters, **module._buffers, **module._modules}
    kind: Any = type(module)
    for name in _cached_properties(kind):
        state.pop(name, None)
    return state


@functools.cache
def _cached_properties(kind: Any) -> tuple[str, ...]:
    members = (item for base in kind.__mro__ for item in vars(base).items())
    return tuple(name for name, value in members if isinstance(value, functools.cached_property))


def changed(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """The names that now stand for another object than before."""
    names = dict.fromkeys([*before, *after])
    missing = object()
    return tuple(
        name for name in names if before.get(name, missing) is not after.get(name, missing)
    )
