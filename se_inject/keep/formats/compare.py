"""Makes example inputs for an export, and compares what was written with the model."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from se_inject.edit.block_class import edit_of
from se_inject.errors import ExportError, first_line
from se_inject.torch_private import pytree


def example_tensors(model: nn.Module) -> tuple[Any, ...]:
    """Random positional arguments like those that the model was recorded with, on the CPU.

    A batch of one image becomes a batch of two, because torch.export would take a batch size of one
    for a constant.

    Raises:
        ExportError: the model was recorded with keyword arguments.
    """
    edit = next(edit for module in model.modules() if (edit := edit_of(module)))
    args, kwargs = edit.settings.example
    if kwargs:
        raise ExportError(
            f"the forward takes keyword arguments ({', '.join(kwargs)}); export it by hand."
        )
    dtype = next(p.dtype for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    batches = {t.shape[0] for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.dim()}

    def random(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = (2, *value.shape[1:]) if batches == {1} and value.dim() else value.shape
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype, device="cpu")
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    return tuple(pytree.tree_map(random, args))


# The allowed difference, as a share of the largest output. It is several roundings of each dtype.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_equal(
    model: nn.Module, other: Callable[..., Any], args: tuple[Any, ...], name: str
) -> None:
    """Raise an :class:`ExportError` unless both give the same outputs up to rounding.

    A deep network can amplify the rounding of one operation beyond any fixed bound. If the outputs
    differ, copies in float64 are therefore compared, which round much less. An ONNX session is not
    a module and has no such copy. Its outputs have to be about as near to those of the float64
    model as the model's own outputs are.
    """
    expected = _outputs(model, args)
    got = _outputs(other, args)
    if not (fault := _difference(got, expected)):
        return
    try:
        same = _same_in_double(model, other, args, expected, got)
    except (RuntimeError, TypeError):  # the forward insists on another dtype
        same = False
    if not same:
        raise ExportError(
            f"{name} gives other outputs than the model ({fault}); nothing is written."
        )


def _same_in_double(
    model: nn.Module,
    other: Callable[..., Any],
    args: tuple[Any, ...],
    expected: list[Tensor],
    got: list[Tensor],
) -> bool:
    exact_args = pytree.tree_map(_double, args)
    exact = _outputs(_in_double(model), exact_args)
    if isinstance(other, nn.Module):
        return not _difference(_outputs(_in_double(other), exact_args), exact)
    if len(got) != len(exact):
        return False
    return all(
        _error(a, e) <= 4 * _error(b, e) for a, b, e in zip(got, expected, exact, strict=True)
    )


def _outputs(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(function(*args)) if isinstance(t, Tensor)]


def _in_double(module: nn.Module) -> nn.Module:
    """A copy in float64. In an exported program, the dtypes in its operations change too."""
    module = copy.deepcopy(module).double()
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            node.args = map_aggregate(node.args, _wide)
            node.kwargs = map_aggregate(node.kwargs, _wide)
        module.recompile()
    return module


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _difference(got: list[Tensor], expected: list[Tensor]) -> str:
    """What differs by more than several roundings, or an empty text if nothing does."""
    try:
        for a, b in zip(got, expected, strict=True):
            scale = b.abs().max().item() if b.is_floating_point() and b.numel() else 0.0
            atol = _TOLERANCE.get(b.dtype, 0.0) * (scale or 1.0)
            torch.testing.assert_close(a, b, rtol=0, atol=atol)
    except (AssertionError, ValueError) as error:
        return first_line(error)
    return ""


def _error(a: Tensor, exact: Tensor) -> float:
    """The largest difference from the exact output. It is infinite if shapes differ, or for NaN."""
    if a.shape != exact.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    worst = (a.double() - exact.double()).abs().max().item()
    return worst if worst == worst else float("inf")
