"""Classes that get in the way of an edit: they are served rightly or refused whole."""

import abc
import functools
import gc
import linecache
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
from test_whole import state
from torch import Tensor, nn

import se_inject.plan.plan
import se_inject.plan.planner
from se_inject import (
    SEInjectError,
    SqueezeExcite,
    UnsupportedModelError,
    inject_se,
    plan_se,
    remove_se,
    se_parameters,
)
from se_inject.edit.block_class import edit_of

X = torch.randn(2, 4, 6, 6)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def doubled(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return 2 * method(*args, **kwargs)

    return call


class Doubling(nn.Module):
    """Its hook wraps the forward of each new class once more."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.forward = doubled(cls.forward)


class Doubled(Doubling, Plain):
    pass


class DoublingCalls(nn.Module):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__call__ = doubled(cls.__call__)


class DoubledCall(DoublingCalls, Plain):
    pass


class DoublingMeta(type):
    """It wraps in ``__new__`` and in ``__init__``, and answers to every name."""

    def __new__(mcs, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        if "forward" in members:
            members["forward"] = doubled(members["forward"])
        return super().__new__(mcs, name, bases, members)

    def __init__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> None:
        super().__init__(name, bases, members)
        cls.half = doubled(cls.half)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_se_inject"):
            return object()
        raise AttributeError(name)


class OfMeta(Plain, metaclass=DoublingMeta):
    def half(self, x: Tensor) -> Tensor:
        return x / 4

    def forward(self, x: Tensor) -> Tensor:
        return self.half(x) + self.conv(x)


class ReadOnlyMeta(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__} is read-only")


class OfReadOnlyMeta(Plain, metaclass=ReadOnlyMeta):
    pass


class Counting(nn.Module):
    """A hook that keeps a count on each class and a list on the first."""

    level = 0
    known: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.level = cls.level + 1
        Counting.known.append(cls)


class Counted(Counting, Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.level * self.conv(x)


class Abstract(abc.ABC, Plain):
    @abc.abstractmethod
    def width(self) -> int: ...


class Concrete(Abstract):
    def width(self) -> int:
        return 4


T = TypeVar("T")


class Generic_(Plain, Generic[T]):  # noqa: N801
    pass


class Slots(Plain):
    __slots__ = ("extra",)


class SilentTrain(Plain):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)


class Answers(Plain):
    """Its ``__getattr__`` has an answer to most names, and None is one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None


class UnhashableMeta(type):
    __hash__ = None  # type: ignore[assignment]


class Unhashable(Plain, metaclass=UnhashableMeta):
    """Beside it, another subclass of the same base is served."""


class RefusesOneName(Plain):
    def __getattribute__(self, name: str) -> Any:
        if name in ("se", "se_inject"):
            raise RuntimeError(f"no {name} here")
        return super().__getattribute__(name)


class HooksInItsWay(Plain):
    def register_forward_hook(self, hook: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("no hooks here")


class CopiesToAnother(Plain):
    def __deepcopy__(self, memo: Any) -> Any:
        return nn.Identity()


class CopiesToNothing(Plain):
    def __deepcopy__(self, memo: Any) -> Any:
        return None


class Holds(Plain):
    """What it holds is found only once it is copied itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CopiesToNothing()

    def __deepcopy__(self, memo: Any) -> Any:
        return None

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + self.conv(x)


class OddAttribute(Plain):
    def __init__(self) -> None:
        super().__init__()
        vars(self)[3] = "an attribute without a name"  # type: ignore[index]


class OwnClass(Plain):
    """``__class__`` is a property, as mocks have it."""

    __class__ = property(lambda self: Plain)  # type: ignore[assignment]


SERVED = [
    Doubled,
    DoubledCall,
    OfMeta,
    OfReadOnlyMeta,
    Counted,
    Concrete,
    Generic_,
    Slots,
    SilentTrain,
    Answers,
    RefusesOneName,
    HooksInItsWay,
    CopiesToAnother,
    CopiesToNothing,
    Holds,
    OddAttribute,
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SERVED)
def test_served(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), Plain())
    y, before = model(X), state(model)
    inject_se(model, 1, divisor=1, example_input=X)
    assert edit_of(model[0])
    assert torch.equal(model(X), y)
    for p in se_parameters(model):
        p.normal_()
    assert not torch.equal(model(X), y)
    if kind is Concrete:
        assert isinstance(model[0], Abstract)
        assert not isinstance(nn.Linear(1, 1), type(model[0]))
    if kind not in (Doubled, OfMeta):  # whose own methods pickle cannot find either
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(X), model(X))
    remove_se(model)
    assert state(model) == before
    assert torch.equal(model(X), y)


class Drops(Plain):
    """It ignores new children once it is made."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, nn.Module) and "conv" in vars(self).get("_modules", ())):
            super().__setattr__(name, value)


class KeepsElsewhere(Plain):
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, SqueezeExcite):
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)


class Frozen(Plain):
    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("training", "conv") and "conv" in vars(self).get("_modules", ()):
            raise AttributeError(f"{name} is frozen")
        super().__setattr__(name, value)


class KeepsItsClass(Plain):
    def __setattr__(self, name: str, value: Any) -> None:
        if name != "__class__":
            super().__setattr__(name, value)


class Hides(Plain):
    """Its ``__getattribute__`` shows another child than it has."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return nn.Identity() if isinstance(found, SqueezeExcite) else found

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return nn.Identity() if isinstance(found, SqueezeExcite) else found


class AnswersAll(Plain):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return 1


class Loops(Plain):
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, SqueezeExcite):
            setattr(self, name, value)
        super().__setattr__(name, value)


class CachedMeta(type):
    """It makes one class of each name."""

    made: dict[str, type] = {}  # noqa: RUF012

    def __new__(mcs, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        key = name.removeprefix("SE")
        if key not in mcs.made:
            mcs.made[key] = super().__new__(mcs, name, bases, members)
        return mcs.made[key]


class Cached(Plain, metaclass=CachedMeta):
    pass


class Final(Plain):
    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


REFUSED: dict[type[nn.Module], str] = {
    Drops: r"'0' \(Drops\) does not take its SE block \(its class hides or drops.*exclude='0'",
    KeepsElsewhere: "does not take its SE block",
    Frozen: r"does not take its SE block \(AttributeError: se is frozen\)",
    KeepsItsClass: "its class refuses another __class__",
    Hides: "hides or drops the attribute 'se'",
    AnswersAll: "has an attribute of every name",
    Loops: r"does not take its SE block \(RecursionError",
    Cached: "cannot be subclassed .*makes no new subclass",
    Final: r"Final cannot be subclassed \(Final is final\)\. Pass exclude='0'",
    OwnClass: ".",
}


@torch.no_grad()
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_whole(kind: type[nn.Module]) -> None:
    model = nn.Sequential(Plain(), kind(), Plain())
    model[0], model[1] = model[1], model[0]
    y, before = model(X), state(model)
    with pytest.raises(SEInjectError, match=REFUSED[kind]) as caught:
        inject_se(model, 1, divisor=1, example_input=X)
    assert isinstance(caught.value, UnsupportedModelError) or kind is OwnClass
    assert len(str(caught.value).splitlines()) <= 2
    assert state(model) == before
    assert torch.equal(model(X), y)
    inject_se(model, 1, divisor=1, example_input=X, exclude="0")
    assert edit_of(model[1])


class FrozenMode(Plain):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and "conv" in vars(self).get("_modules", ()):
            raise AttributeError("the mode is frozen")
        super().__setattr__(name, value)


class FailsToTrain(Plain):
    def train(self, mode: bool = True) -> Any:
        raise SilentError


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class TakesNoMode(Plain):
    def train(self) -> Any:  # type: ignore[override]
        return super().train(True)


class TrainsForEver(Plain):
    def train(self, mode: bool = True) -> Any:
        return self.train(mode)


class ForgetsItsClass(Plain):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise LookupError("no class")


class HidesItsParameters(Plain):
    def parameters(self, recurse: bool = True) -> Any:
        raise RuntimeError("no parameters")


class OpaqueMeta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name == "__mro__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class OfOpaqueMeta(Plain, metaclass=OpaqueMeta):
    pass


class NoHash(Plain):
    __hash__ = None  # type: ignore[assignment]


NOT_PLANNED: dict[type[nn.Module], str] = {
    FrozenMode: r"eval\(\) of a copy .*AttributeError: the mode is frozen \(test_odd_classes.py",
    FailsToTrain: r"eval\(\) of a copy of the model fails \(SilentError: no message",
    TakesNoMode: r"eval\(\) of a copy of the model fails \(TypeError",
    TrainsForEver: r"eval\(\) of a copy of the model fails \(RecursionError",
    ForgetsItsClass: r"its own code fails \(test_odd_classes.py, line .*LookupError: no class",
    HidesItsParameters: r"its own code fails \(test_odd_classes.py, line .*no parameters",
    OfOpaqueMeta: r"its own code fails \(test_odd_classes.py, line .*__mro__",
    NoHash: "the modules of Sequential cannot be listed .*unhashable type: 'NoHash'",
}


@torch.no_grad()
@pytest.mark.parametrize("kind", NOT_PLANNED)
def test_refused_before_it_is_planned(kind: type[nn.Module]) -> None:
    model = nn.Sequential(Plain(), kind())
    before = [(vars(m).copy(), type(m)) for m in (model, model[0], model[1])]
    for function in (plan_se, inject_se):
        with pytest.raises(SEInjectError, match=NOT_PLANNED[kind]) as caught:
            function(model, example_input=X)
        assert len(str(caught.value).splitlines()) <= 2
    assert [(vars(m).copy(), type(m)) for m in (model, model[0], model[1])] == before


def test_a_forward_that_is_no_function_is_skipped() -> None:
    class Property(Plain):
        @property
        def forward(self) -> Any:  # type: ignore[override]
            return lambda x: x + self.conv(x)

    plan = plan_se(nn.Sequential(Plain(), Property()), 1, divisor=1, example_input=X)
    assert [site.block for site in plan.sites] == ["0"]
    assert [s.detail for s in plan.skipped] == [
        "its forward is no function of its class; exclude= leaves the block out"
    ]


def test_a_fault_of_ours_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        return {}["missing"]

    code = fails.__code__.replace(co_filename=se_inject.plan.planner.__file__)
    monkeypatch.setattr(se_inject.plan.planner, "with_units", types.FunctionType(code, {}))
    with pytest.raises(KeyError, match="missing"):
        plan_se(nn.Sequential(Plain()), example_input=X)


def test_an_error_of_the_users_own_kind_goes_through() -> None:
    class OwnError(Exception):
        pass

    class Refuses(Plain):
        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, SqueezeExcite):
                raise OwnError
            super().__setattr__(name, value)

    model = nn.Sequential(Plain(), Refuses())
    before = state(model)
    with pytest.raises(OwnError):
        inject_se(model, 1, divisor=1, example_input=X)
    assert state(model) == before


def test_a_layer_whose_train_returns_nothing() -> None:
    class Attention(nn.Identity):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)

        def to(self, *args: Any, **kwargs: Any) -> Any:
            super().to(*args, **kwargs)

    model = nn.Sequential(Plain())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_se(model, example_input=X, se_layer=lambda channels: Attention())
    assert isinstance(model[0].se, Attention)


def test_linecache_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Plain())

    def entries() -> int:
        return sum(name.startswith("<se_inject") for name in linecache.cache)

    gc.collect()
    before, during = entries(), set()
    x = torch.zeros(1, 4, 1, 1)
    for _ in range(10):
        inject_se(model, 1, divisor=1, example_input=x)
        during.add(entries())
        remove_se(model)
    # Planning and its check are slow and the edit is quick: 190 more edits, each with a new class.
    plan = plan_se(model, 1, divisor=1, example_input=x)
    monkeypatch.setattr(se_inject.plan.plan, "verify", lambda *_: None)
    for _ in range(190):
        plan.apply()
        during.add(entries())
        remove_se(model)
    assert max(during) <= before + 2
    del plan
    gc.collect()
    assert entries() <= before
