"""``torch.export`` programs."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import ExportError, first_line
from se_inject.keep.atomic import atomic_write
from se_inject.keep.formats.compare import check_equal, example_tensors
from se_inject.keep.formats.format import Format
from se_inject.torch_private import pytree


def write_torch_export(model: nn.Module, path: Path) -> str:
    """Write a ``torch.export`` program, compare what is read back, and say what loads it."""
    model = copy.deepcopy(model).cpu()
    model.eval()
    args = example_tensors(model)
    with atomic_write(path, TORCH_EXPORT.suffix) as part:
        torch.export.save(export_program(model, args), part)
        check_equal(model, torch.export.load(part).module(), args, "the exported program")
    return f"torch.export.load({str(path)!r}).module()"


def export_program(model: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The eval forward, for any batch size that the model allows."""
    batch = {0: torch.export.Dim.AUTO}
    shapes = pytree.tree_map(lambda v: batch if isinstance(v, Tensor) and v.dim() else None, args)
    try:
        return torch.export.export(model, args, dynamic_shapes=shapes)
    except Exception as error:  # of torch's tracer, about foreign code
        raise ExportError(
            f"torch.export cannot follow {type(model).__name__} ({first_line(error)[:200]})."
        ) from error


TORCH_EXPORT = Format("a torch.export program", ".pt2", write_torch_export)
