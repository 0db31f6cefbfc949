"""Tells which modules trace to the same graph, so that equal blocks are traced only once."""

import enum
import functools
import inspect
from collections.abc import Hashable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
# Most attributes are of these types. A union of types would be built anew for each of them.
_SIMPLE = frozenset((bool, int, float, str, type(None), torch.dtype))
_EQUAL = (bool, int, float, str, torch.dtype, enum.Enum)


def configuration(module: nn.Module, seen: dict[int, int] | None = None) -> Hashable:
    """A key that is equal only for modules that trace to the same graph on the same call.

    ``seen`` numbers modules and tensors in the order in which they come up. If two names stand for
    one object in one block and for two in another, the blocks are not alike.
    """
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]
    seen[id(module)] = len(seen)
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        tuple(
            (name, _hashable(value))
            for name, value in vars(module).items()
            if name not in _MODULE_INTERNALS
        ),
        tuple(
            (name, t if t is None else (*t.shape, t.dtype, seen.setdefault(id(t), len(seen))))
            for name, t in tensors
        ),
        tuple(
            (name, None if child is None else configuration(child, seen))
            for name, child in module._modules.items()
        ),
    )


def _hashable(value: Any) -> Hashable:
    """The value itself if equal values behave alike, or else its id, which no other object has."""
    kind = type(value)
    if kind in _SIMPLE or isinstance(value, _EQUAL):
        return (kind, value)
    if kind is tuple and all(type(v) is int for v in value):  # a kernel's size, a stride
        return (kind, value)
    if isinstance(value, type) or (inspect.isroutine(value) and not inspect.ismethod(value)):
        return value
    if isinstance(value, functools.partial):
        return (value.func, _hashable(value.args), _hashable(value.keywords))
    if isinstance(value, tuple | list):
        return (type(value), tuple(_hashable(v) for v in value))
    if isinstance(value, dict):
        return (type(value), tuple((k, _hashable(v)) for k, v in value.items()))
    return id(value)
