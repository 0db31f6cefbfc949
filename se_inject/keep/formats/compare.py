"""Example inputs for an export, and the comparison of what was written with the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.block_class import edit_of
from se_inject.errors import ExportError, first_line
from se_inject.torch_private import pytree


def example_tensors(model: nn.Module) -> tuple[Any, ...]:
    """Random positional arguments like those that the model was recorded with, on the CPU.

    A batch of one image becomes a batch of two: torch.export would take a batch of one for a
    constant.

    Raises:
        ExportError: it was recorded with keyword arguments.
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
            return torch.zeros(shape, dtype=value.dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(pytree.tree_map(random, args))


# The allowed difference as a fraction of the largest output: several roundings of each dtype.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_equal(
    model: nn.Module, other: Callable[..., Any], args: tuple[Any, ...], name: str
) -> None:
    """Raise an :class:`ExportError` unless both give the same outputs up to rounding."""
    with torch.no_grad():
        outputs = [pytree.tree_leaves(f(*args)) for f in (model, other)]
    expected, got = ([t for t in leaves if isinstance(t, Tensor)] for leaves in outputs)
    try:
        for a, b in zip(got, expected, strict=True):
            scale = b.abs().max().item() if b.is_floating_point() and b.numel() else 0.0
            atol = _TOLERANCE.get(b.dtype, 0.0) * (scale or 1.0)
            torch.testing.assert_close(a, b, rtol=0, atol=atol)
    except (AssertionError, ValueError) as error:
        raise ExportError(
            f"{name} gives other outputs than the model ({first_line(error)}); nothing is written."
        ) from error
