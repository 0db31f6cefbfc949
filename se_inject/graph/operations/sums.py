"""Finds the calls of torch functions that add two maps, however they are written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from se_inject.graph.operations.ops import ADD, BLEND, NEGATE, SUBTRACT


@dataclass(frozen=True)
class Sum:
    """A sum of two maps of one shape."""

    a: Tensor
    b: Tensor
    alpha: float = 1.0  # the factor of the second map
    blended: bool = False  # not a sum of two operands that a graph could show: lerp, index_add
    stacked: bool = False  # one function stacks the maps, and the next adds the items of the stack


# The name and the arguments of the function that made a tensor, if it is one of REMEMBERED.
Made = Callable[[Tensor], tuple[str, tuple[Any, ...], Mapping[str, Any]] | None]
REMEMBERED = NEGATE | {"stack"}


def sum_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Made) -> Sum | None:
    """The sum that a function makes, if it adds two maps.

    ``x - (-h)`` and ``torch.sub(x, h, alpha=-1)`` are additions in other words. So are
    ``torch.addcmul(x, gamma, h)`` with a layer scale ``gamma`` and ``torch.stack([x, h]).sum(0)``.
    A weighted mean of two maps (``lerp``) is not a residual addition, but it has to be reported.
    """
    a, b = operands(args, kwargs)
    if name in ADD:
        return _sum(a, b, alpha=_number(kwargs.get("alpha", 1)))
    if name in SUBTRACT:
        if isinstance(b, Tensor) and (maker := made(b)) and maker[0] in NEGATE:
            return _sum(a, b, alpha=_number(kwargs.get("alpha", 1)))
        if (alpha := _number(kwargs.get("alpha", 1))) < 0:
            return _sum(a, b, alpha=-alpha)
        return None
    if name in ("addcmul", "addcmul_"):
        factors = [*args[1:], *(kwargs[k] for k in ("tensor1", "tensor2") if k in kwargs)]
        x = args[0] if args else kwargs.get("input")
        maps = [f for f in factors if _alike(x, f)]
        alpha = _number(kwargs.get("value", 1))
        return _sum(x, maps[0], alpha=alpha, blended=len(maps) > 1) if maps else None
    if name in BLEND:
        maps = [t for t in _flat(args, kwargs) if _alike(t, t)]
        pair = next(
            ((s, t) for i, s in enumerate(maps) for t in maps[i + 1 :] if _alike(s, t)), None
        )
        return _sum(*pair, blended=True) if pair else None
    return _sum_of_stack(name, args, kwargs, made)


def _sum_of_stack(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Made
) -> Sum | None:
    """The sum of a stack, ``torch.stack([x, h]).sum(0)``.

    If it is a mean, or if there are more than two maps, the sum counts as blended.
    """
    if name not in ("sum", "mean", "nansum", "einsum"):
        return None
    stacks = [t for t in _flat(args, kwargs) if isinstance(t, Tensor) and made(t)]
    maker = made(stacks[0]) if stacks else None
    if maker is None or maker[0] != "stack":
        return None
    _, stack_args, stack_kwargs = maker
    maps = [t for t in _flat(stack_args, stack_kwargs) if isinstance(t, Tensor)]
    if name == "einsum":
        return _sum(maps[0], maps[1], blended=True) if len(maps) > 1 else None
    given = [*stack_args[1:], stack_kwargs.get("dim", 0)][0]
    asked = [*args[1:], kwargs.get("dim", kwargs.get("axis"))][0]
    asked = asked[0] if isinstance(asked, tuple | list) and len(asked) == 1 else asked
    rank = stacks[0].dim()
    if len(maps) < 2 or not isinstance(asked, int) or (asked - given) % rank:
        return None
    blended = name != "sum" or len(maps) > 2 or bool(kwargs.get("keepdim"))
    return _sum(maps[0], maps[1], blended=blended, stacked=True)


def operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two operands of a binary function, however they were passed."""
    values = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)]
    return (values[0], values[1]) if len(values) >= 2 else (None, None)


def _sum(a: Any, b: Any, **how: Any) -> Sum | None:
    return Sum(a, b, **how) if _alike(a, b) else None


def _alike(a: Any, b: Any) -> bool:
    """Whether both are tensors of one shape with at least three dims."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.dim() >= 3 and a.shape == b.shape


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _flat(*values: Any) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, tuple | list):
            flat += _flat(*value)
        elif isinstance(value, Mapping):
            flat += _flat(*value.values())
        else:
            flat.append(value)
    return flat
