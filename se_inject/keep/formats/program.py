"""Writes programs of ``torch.export``."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.api import set_plain_ops
from se_inject.errors import ExportError, first_line
from se_inject.keep.atomic import atomic_write
from se_inject.keep.deploy.optimize import Optimization, optimized_copy
from se_inject.keep.formats.compare import check_equal, example_tensors
from se_inject.keep.formats.format import Format
from se_inject.torch_private import pytree


def write_torch_export(model: nn.Module, path: Path) -> str:
    """Write a ``torch.export`` program, read it back to compare it, and return what loads it."""
    plain, args = plain_copy(model)
    return _write(plain, plain, args, path)


def write_optimized_torch_export(model: nn.Module, path: Path) -> tuple[str, Optimization]:
    """Do the same as :func:`write_torch_export` with an optimised copy, and say what was done."""
    plain, args = plain_copy(model)
    fast, done = optimized_copy(plain, example_input=args)
    return _write(plain, fast, args, path), done


def plain_copy(model: nn.Module) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy in eval mode, on the CPU and with plain operations, and arguments that it takes."""
    plain = set_plain_ops(copy.deepcopy(model).cpu())
    plain.eval()
    return plain, example_tensors(plain)


def _write(model: nn.Module, exported: nn.Module, args: tuple[Any, ...], path: Path) -> str:
    """Write ``exported``, and compare the file with ``model``."""
    with atomic_write(path, TORCH_EXPORT.suffix) as part:
        torch.export.save(export_program(exported, args), part)
        check_equal(model, torch.export.load(part).module(), args, "the exported program")
    return f"torch.export.load({str(path)!r}).module()"


def export_program(
    model: nn.Module, args: tuple[Any, ...], *, sizes: bool = False
) -> torch.export.ExportedProgram:
    """Export the eval forward for any batch size and, with ``sizes``, for maps of any size.

    If the forward of the model fixes a size, the program does so too.
    """

    def dims(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return None
        space = range(2, value.dim()) if sizes and value.is_floating_point() else ()
        return dict.fromkeys((0, *space), torch.export.Dim.AUTO)

    try:
        shapes = pytree.tree_map(dims, args)
        # Old versions of torch are strict unless told otherwise. They compile the network first,
        # which takes longer and works for fewer of them.
        return torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch's tracer may raise anything about foreign code
        raise ExportError(
            f"torch.export cannot follow {type(model).__name__} ({first_line(error)[:200]})."
        ) from error


TORCH_EXPORT = Format(
    "a torch.export program",
    ".pt2",
    write_torch_export,
    write_optimized=write_optimized_torch_export,
)
