"""ONNX files."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import ExportError, first_line
from se_inject.keep.atomic import replacing
from se_inject.keep.formats.compare import check_equal, example_tensors
from se_inject.keep.formats.program import export_program
from se_inject.torch_private import pytree


def write_onnx(model: nn.Module, path: Path) -> None:
    """Write an ONNX file, compared with the model in onnxruntime."""
    for name in ("onnxruntime", "onnxscript"):  # torch writes ONNX through the second
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"there is no {name}: pip install 'se-inject[onnx]'.")
    import onnxruntime

    model = copy.deepcopy(model).cpu().eval()
    args = example_tensors(model)
    program = export_program(model, args)
    with replacing(path, ".onnx") as part:
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
