"""``torch.export`` programs."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.api import set_plain_ops
from se_inject.errors import ExportError, first_line
from se_inject.keep.atomic import atomic_write
from se_inject.keep.formats.compare import check_equal, example_tensors
from se_inject.keep.formats.format import Format
from se_inject.torch_private import pytree


def write_torch_export(model: nn.Module, path: Path) -> str:
    """Write a ``torch.export`` program, compare what is read back, and say what loads it."""
    model = set_plain_ops(copy.deepcopy(model).cpu())
    model.eval()
    args = example_tensors(model)
    with atomic_write(path, TORCH_EXPORT.suffix) as part:
        torch.export.save(export_program(model, args), part)
        check_equal(model, torch.export.load(part).module(), args, "the exported program")
    return f"torch.export.load({str(path)!r}).module()"


def export_program(
    model: nn.Module, args: tuple[Any, ...], *, sizes: bool = False
) -> torch.export.ExportedProgram:
    """The eval forward, for any batch size and, with ``sizes``, any size of the maps it takes.

    Only sizes that the model allows are meant: where its forward fixes one, the program does too.
    """

    def dims(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return None
        space = range(2, value.dim()) if sizes and value.is_floating_point() else ()
        return dict.fromkeys((0, *space), torch.export.Dim.AUTO)

    try:
        return torch.export.export(model, args, dynamic_shapes=pytree.tree_map(dims, args))
    except Exception as error:  # of torch's tracer, about foreign code
        raise ExportError(
            f"torch.export cannot follow {type(model).__name__} ({first_line(error)[:200]})."
        ) from error


TORCH_EXPORT = Format("a torch.export program", ".pt2", write_torch_export)
