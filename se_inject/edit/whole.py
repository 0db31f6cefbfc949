"""All or nothing: remember what a block was before an edit, and put it back whatever happens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

# When an attribute is set to a child, these dicts of the module can change besides its __dict__.
_REGISTRIES = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True, eq=False)
class ModuleState:
    """The class and the attributes of one module at one moment, without those of its children.

    Everything is read and put back without asking the class of the module, because its
    ``__getattr__`` or ``__setattr__`` may do something else.
    """

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    registries: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleState":
        own = attributes_of(module)
        return cls(module, type(module), dict(own), tuple(dict(own[key]) for key in _REGISTRIES))

    def put_back(self) -> None:
        """Make the module what it was. This is safe to repeat, even if it was stopped halfway."""
        if type(self.module) is not self.kind:
            object.__setattr__(self.module, "__class__", self.kind)
        own = attributes_of(self.module)
        _put_back(own, self.attributes)
        for key, registry in zip(_REGISTRIES, self.registries, strict=True):
            _put_back(own[key], registry)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The ``__dict__`` of a module, even if its class changes how attributes are read."""
    attributes: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return attributes


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    now.update(before)


def all_or_nothing(do: Callable[[], None], states: Iterable[ModuleState]) -> None:
    """Run ``do``; if it fails or is interrupted at any moment, put the modules back."""
    before = list(states)

    def undo() -> None:
        for state in before:
            state.put_back()

    run_or_undo(do, undo)


def run_or_undo(do: Callable[[], None], undo: Callable[[], None]) -> None:
    """Run ``do``; if it fails or is interrupted at any moment, run ``undo``.

    A Ctrl-C can come while ``undo`` runs because of an error. ``undo`` then runs once more, so it
    has to be safe to repeat.
    """
    try:
        try:
            do()
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise
