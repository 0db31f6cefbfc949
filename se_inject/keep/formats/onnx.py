"""ONNX files."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import ExportError, first_line
from se_inject.keep.atomic import atomic_write
from se_inject.keep.formats.compare import check_equal, example_tensors
from se_inject.keep.formats.format import Format, need_packages
from se_inject.keep.formats.program import export_program
from se_inject.torch_private import pytree


def write_onnx(model: nn.Module, path: Path) -> str:
    """Write an ONNX file, compare it with the model in onnxruntime, and say what loads it."""
    need_packages("onnxruntime", "onnxscript", extra="onnx")  # torch writes ONNX with the second
    import onnxruntime

    model = copy.deepcopy(model).cpu()
    model.eval()
    args = example_tensors(model)
    program = export_program(model, args)
    with atomic_write(path, ONNX.suffix) as part:
        try:
            torch.onnx.export(program, (), part, dynamo=True, external_data=False, verbose=False)
            session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        except Exception as error:  # of two libraries, about operations and dtypes they lack
            raise ExportError(
                f"ONNX cannot hold {type(model).__name__} ({first_line(error)[:200]})."
            ) from error
        names = [entry.name for entry in session.get_inputs()]

        def run(*values: Any) -> list[Tensor]:
            tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
            inputs = dict(zip(names, (t.numpy() for t in tensors), strict=True))
            return [torch.from_numpy(output) for output in session.run(None, inputs)]

        check_equal(model, run, args, "the ONNX file")
    return f"onnxruntime.InferenceSession({str(path)!r})"


ONNX = Format("an ONNX file", ".onnx", write_onnx, extra="onnx")
