"""The generated classes of edited blocks, and how they pickle.

An edited block is an instance of a generated subclass of its class. That subclass is in no module,
so ``pickle`` (``torch.save(model)``) carries the source text of its forwards, and the class is
built anew where the pickle is loaded. Copies made by ``copy.deepcopy`` share the class.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from se_inject.edit.around import BASE_FORWARD, renamed
from se_inject.errors import UnsupportedModelError
from se_inject.graph.recording.call import Arguments
from se_inject.graph.source import ForwardSource
from se_inject.layers.variant import Variant
from se_inject.sites.scaled import Where


@dataclass(frozen=True)
class Settings:
    """The options of the ``inject_se`` call, which a checkpoint of the SE blocks has to repeat."""

    r: tuple[int, ...]  # the reduction ratio of each child
    variant: Variant
    custom: bool  # whether a user's se_layer made the children
    example: Arguments = field(compare=False)  # what the forward was recorded with, on meta
    where: Where = "residual"  # a model that was pickled before there were units does not say


@dataclass(frozen=True, eq=False)
class Edit:
    """What was done to a block.

    The generated class holds it and the instances do not, so that copies and checkpoints of an
    instance need to know nothing of it.
    """

    base: type[nn.Module]  # the class that the block had before
    children: tuple[str, ...]  # the attributes that the SE blocks became
    # For each SE block, the child of the block whose output it alone reads. None means that the
    # map comes from an operation or that others read it too.
    producers: tuple[str | None, ...]
    # How each attribute was before: "absent", or None in "__dict__", "_modules", "_parameters" or
    # "_buffers".
    before: tuple[str, ...]
    eval: ForwardSource
    train: ForwardSource | None  # None means that the forward does not read the mode
    settings: Settings

    def __deepcopy__(self, memo: Any) -> "Edit":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Edit, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @functools.cached_property
    def block_class(self) -> type[nn.Module]:
        """The subclass of ``base`` whose forward calls the SE children.

        Raises:
            Exception: whatever an ``__init_subclass__`` of the class raises.
        """
        forward = self.eval.compile()
        if self.train is not None:
            forward = _by_mode(forward, self.train.compile())
        members = {
            "__module__": self.base.__module__,
            "__doc__": self.base.__doc__,
            "__reduce_ex__": _reduce,
            "_se_inject": self,
            "forward": forward,
            "qconfig": NotQuantized(),
        }
        if BASE_FORWARD in self.eval.text:
            members[BASE_FORWARD] = renamed(self.base.forward)
        return _subclass(self.base, members)


class NotQuantized:
    """The attribute by which eager quantization (``prepare``) says that it wants a module.

    It replaces layers by quantized ones and rewrites no forward. An SE block between them would get
    quantized maps, for which its operations do not exist, so ``convert`` would leave a network that
    fails in its first forward. ``prepare`` fails in words instead. FX and PT2E quantization, which
    rewrite the forward, set no such attribute of a block.
    """

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        if module is None:
            return self
        try:
            return vars(module)["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        if value is not None:
            raise UnsupportedModelError(
                f"eager quantization has no way into {type(module).__name__}, which has an SE"
                " block. Use FX (prepare_fx) or PT2E quantization, or remove_se(model) first."
            )
        vars(module)["qconfig"] = None

    def __delete__(self, module: nn.Module) -> None:
        vars(module).pop("qconfig", None)


def edit_of(module: nn.Module) -> Edit | None:
    """What se_inject did to a block, or None if it did nothing."""
    for kind in type(module).__mro__:  # and not getattr, which a metaclass may answer
        if isinstance(edit := vars(kind).get("_se_inject"), Edit):
            return edit
    return None


# What each class has of its own, so that deleting it would give the class that of its base.
_OF_EACH_CLASS = ("__dict__", "__weakref__", "__abstractmethods__", "_abc_impl")


def _subclass(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass that differs from ``base`` in ``members`` and in nothing else.

    An ``__init_subclass__`` or a metaclass may wrap the methods of each new class. The block runs
    the methods of ``base``, which are wrapped already, so what was wrapped anew is taken off again.
    """
    known = set(map(id, type.__subclasses__(base)))  # a metaclass may forbid hashing
    made = type(f"SE{base.__name__}", (base,), dict(members))
    if not isinstance(made, type) or id(made) in known or base not in made.__bases__:
        raise TypeError("its metaclass makes no new subclass")
    for name, value in members.items():
        if vars(made).get(name) is not value:
            type.__setattr__(made, name, value)
    inherited = {name for kind in base.__mro__ for name in vars(kind)}
    for name in inherited & set(vars(made)) - set(members) - set(_OF_EACH_CLASS):
        type.__delattr__(made, name)
    return made


def _by_mode(in_eval: Callable[..., Any], in_train: Callable[..., Any]) -> Callable[..., Any]:
    """One forward that calls the other two, as ``self.training`` says."""

    @functools.wraps(in_eval)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (in_train if self.training else in_eval)(self, *args, **kwargs)

    return forward


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """The ``__reduce_ex__`` of an edited block: that of its base class, and the edit."""
    edit = edit_of(self)
    assert edit is not None
    reduced: Any = super(edit.block_class, self).__reduce_ex__(protocol)
    # A library that has made the block an instance of yet another class (sharding does) pickles
    # that class itself.
    if type(self) is not edit.block_class:
        return reduced
    make, args, *state = reduced
    make, *args = (edit.base if part is edit.block_class else part for part in (make, *args))
    return _remake, (edit, make, tuple(args)), *state


def _remake(edit: Edit, make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """Make the block as its base class does, and give it the generated class (for ``pickle``)."""
    module = make(*args)
    module.__class__ = edit.block_class
    return module
