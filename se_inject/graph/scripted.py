"""Wraps TorchScript functions that a forward calls, so that graphs and pickles can hold them."""

import sys
from typing import Any

import torch


class Scripted:
    """A TorchScript function, found by the name that it has in a module.

    Such functions do not pickle, and all of them have the same ``__name__``.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self.function = vars(sys.modules[module])[name]
        self.__module__ = __name__
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _scripted, (self.module, self.name)

    def __deepcopy__(self, memo: Any) -> "Scripted":
        return self


def _scripted(module: str, name: str) -> Scripted:
    __import__(module)
    return Scripted(module, name)


def named(function: "torch.jit.ScriptFunction[Any, Any]", near: dict[str, Any]) -> Scripted | None:
    """A TorchScript function with its name, or None if no module has a name for it.

    Args:
        function: the function that is called.
        near: the namespace of the code that calls it, where most such functions are.
    """
    for space in (near, *(vars(module) for module in list(sys.modules.values()))):
        for name, value in list(space.items()):
            if value is function and space.get("__name__") in sys.modules:
                return Scripted(space["__name__"], name)
    return None
