"""What a module holds in lists, dicts and objects of its own, and what a forward changes in them.

A graph computes maps and does nothing else. If a forward also keeps maps in ``self.cache``, or
counts its calls in ``self.stats``, the graph would silently stop doing so.
"""

import collections
import operator
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from se_inject.graph.containers import is_flat

_DEEPEST = 4
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_OF_CODE = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)


class Held:
    """What a module and the modules in it hold at one moment, and what has changed since then."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, _held_by(module, "")

    def changed(self, path: str = "") -> str | None:
        """The first attribute that holds other objects now, of the module at ``path`` or inside it.

        If an attribute of the root itself is another object now, it is left out, because
        :func:`state_of` sees that it was set.
        """
        after = _held_by(self.module.get_submodule(path), path)
        inside = f"{path}." if path else ""
        before = [p for p in self.before if p == path or p.startswith(inside)]
        for part in dict.fromkeys([*before, *after]):
            was, now = self.before.get(part, {}), after.get(part, {})
            for name in dict.fromkeys([*was, *now]):
                a, b = was.get(name, []), now.get(name, [])
                if not part and [*map(id, a[:1])] != [*map(id, b[:1])]:
                    continue
                if len(a) != len(b) or any(map(operator.is_not, a, b)):
                    return f"{part}.{name}".lstrip(".")
        return None

    def renew(self, path: str) -> None:
        """Accept what a child holds now, because it has run and may keep whatever it likes."""
        self.before |= _held_by(self.module.get_submodule(path), path)


def _held_by(module: nn.Module, at: str) -> dict[str, dict[str, list[Any]]]:
    """For each module and each of its attributes, everything reachable from the attribute."""
    return {
        path: {
            name: [value] if is_flat(value) else [value, *_inside(value, _DEEPEST)]
            for name, value in vars(part).items()
            if path or name not in _REGISTRIES
        }
        for path, part in module.named_modules(prefix=at)
    }


def _inside(value: Any, depth: int) -> Iterator[Any]:
    if depth == 0 or value is None or isinstance(value, _OF_CODE):
        return
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        inner = list(value)
    else:
        named = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if not isinstance(named, dict):
            return
        inner = [part for item in list(named.items()) for part in item]
    for part in inner:
        yield part
        yield from _inside(part, depth - 1)
