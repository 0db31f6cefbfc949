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
    example: Arguments = field(compare=False)  # the arguments of the recorded forward, on meta
    where: Where = "residual"  # the default serves models that were pickled before units existed


@dataclass(frozen=True, eq=False)
class Edit:
    """What was done to a block.

    The generated class holds this record and its instances do not. Copies and checkpoints of an
    instance therefore do not need to know about it.
    """

    base: type[nn.Module]  # the class that the block had before
    children: tuple[str, ...]  # the attributes that hold the SE blocks
    # For each SE block, the child of the block whose output only this SE block reads. None means
    # that the map comes from an operation or that others read it too.
    producers: tuple[str | None, ...]
    # Where each attribute was before the edit. "absent" means nowhere. "__dict__", "_modules",
    # "_parameters" or "_buffers" means that it was None in that dict of the module.
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
    """The attribute ``qconfig``, by which eager quantization (``prepare``) marks a module.

    Eager quantization replaces layers by quantized ones and does not rewrite the forward. An SE
    block between them would get quantized maps, for which its operations do not exist, and the
    network that ``convert`` returns would fail in its first forward. This attribute makes
    ``prepare`` fail instead, with a message. FX and PT2E quantization rewrite the forward and do
    not set the attribute on a block.
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
    for kind in type(module).__mro__:  # getattr is not used, because a metaclass may answer it
        if isinstance(edit := vars(kind).get("_se_inject"), Edit):
            return edit
    return None


# Every class has its own version of these. If one were deleted, that of the base would show.
_OF_EACH_CLASS = ("__dict__", "__weakref__", "__abstractmethods__", "_abc_impl")


def _subclass(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass that differs from ``base`` in ``members`` and in nothing else.

    An ``__init_subclass__`` or a metaclass may wrap the methods of each new class. The methods of
    ``base`` are wrapped already and the block should run them, so the newly wrapped ones are
    deleted again.
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
    """A forward that calls one of the two, depending on ``self.training``."""

    @functools.wraps(in_eval)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (in_train if self.training else in_eval)(self, *args, **kwargs)

    return forward


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """The ``__reduce_ex__`` of an edited block: the result of its base class, plus the edit."""
    edit = edit_of(self)
    assert edit is not None
    reduced: Any = super(edit.block_class, self).__reduce_ex__(protocol)
    # If a library has made the block an instance of yet another class, as sharding does, that
    # library pickles the class itself.
    if type(self) is not edit.block_class:
        return reduced
    make, args, *state = reduced
    make, *args = (edit.base if part is edit.block_class else part for part in (make, *args))
    return _remake, (edit, make, tuple(args)), *state


def _remake(edit: Edit, make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """Make the block as its base class would and give it the generated class (for ``pickle``)."""
    module = make(*args)
    module.__class__ = edit.block_class
    return module
