"""Nested tuples, lists and dicts of tensors, which forwards take and return."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from se_inject.torch_private import pytree


def leaves(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts: a fast ``pytree.tree_leaves``."""
    found: list[Any] = []
    _collect(value, found)
    return found


# Planning asks this of thousands of values, so the quick tests come first.
_PLAIN = frozenset((Tensor, nn.Parameter, int, float, bool, str, type(None)))
_WHOLE = (Tensor, nn.Module)  # a ModuleDict does not count as a Mapping here


def _collect(value: Any, found: list[Any]) -> None:
    kind = type(value)
    if kind in _PLAIN:
        found.append(value)
    elif kind is tuple or kind is list:
        for item in value:
            _collect(item, found)
    elif isinstance(value, _WHOLE):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, (dict, Mapping)):  # dict comes first, because that test is much faster
        for item in value.values():
            _collect(item, found)
    else:
        found.append(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def rebuilt(value: Any) -> Any:
    """The same tensors in new containers, because HRNet's modules write into their input list."""
    if isinstance(value, Tensor) or value is None:
        return value
    if isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
        return value
    return pytree.tree_map(lambda leaf: leaf, value)


def all_leaves(value: Any) -> Iterator[Any]:
    """The same as :func:`leaves`, without asking a traced tuple of sizes for its length."""
    if isinstance(value, tuple | list):
        for item in tuple.__iter__(value) if isinstance(value, tuple) else value:
            yield from all_leaves(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from all_leaves(item)
    else:
        yield value


# Most attributes of a module have one of these types. Such a value is its own copy.
FLAT = frozenset((bool, int, float, str, type(None)))
_DICTS = frozenset((dict, OrderedDict))


def is_flat(value: Any) -> bool:
    """Whether there is nothing to look into: a number, a text, or an empty dict (of hooks)."""
    kind = type(value)
    return kind in FLAT or (kind in _DICTS and not value)


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor among the leaves."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
