"""Writes ONNX files."""

import itertools
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.insert import injected
from se_inject.errors import ExportError, first_line
from se_inject.keep.atomic import atomic_write
from se_inject.keep.deploy.optimize import Optimization, optimized_copy
from se_inject.keep.formats.compare import check_equal
from se_inject.keep.formats.format import Format, need_packages
from se_inject.keep.formats.old_torch import missing_translations, name_dims
from se_inject.keep.formats.program import export_program, plain_copy
from se_inject.names import base_architecture
from se_inject.torch_private import pytree

# The names of the dims of a map in the file, by its rank.
_DIMS = {3: ("length",), 4: ("height", "width"), 5: ("frames", "height", "width")}


def write_onnx(model: nn.Module, path: Path, *, opset: int | None = None) -> str:
    """Write an ONNX file, compare it with the model in onnxruntime, and return what loads it.

    The file takes any batch size, and maps of any size if the model does. Its inputs and outputs
    have names. Its metadata name the network, its r, and the version of se-inject that wrote it.

    Args:
        model: an injected model.
        path: the file. Its name ends in ``.onnx``.
        opset: the version of ONNX's operations. By default it is the one that torch prefers.
    """
    need_packages("onnxruntime", "onnxscript", extra="onnx")  # torch needs onnxscript to write
    plain, args = plain_copy(model)
    return _write_for_sizes(plain, plain, args, path, _metadata(model), opset)


def write_optimized_onnx(
    model: nn.Module, path: Path, *, opset: int | None = None
) -> tuple[str, Optimization]:
    """Do the same as :func:`write_onnx` with an optimised copy, and also return what was done."""
    need_packages("onnxruntime", "onnxscript", extra="onnx")
    plain, args = plain_copy(model)
    fast, done = optimized_copy(plain, example_input=args)
    return _write_for_sizes(plain, fast, args, path, _metadata(model), opset), done


def _write_for_sizes(
    model: nn.Module,
    exported: nn.Module,
    args: tuple[Any, ...],
    path: Path,
    said: dict[str, str],
    opset: int | None,
) -> str:
    """Write ``exported``, for maps of any size if possible, and compare it with ``model``."""
    other = _other_size(model, args)
    with atomic_write(path, ONNX.suffix) as part:
        if other is not None:
            try:
                _write(model, exported, part, [args, other], said, opset)
            except ExportError:  # The network is exported for a single size instead.
                other = None
        if other is None:
            _write(model, exported, part, [args], said, opset)
    return f"onnxruntime.InferenceSession({str(path)!r})"


def _write(
    model: nn.Module,
    exported: nn.Module,
    path: Path,
    inputs: Sequence[tuple[Any, ...]],
    said: dict[str, str],
    opset: int | None,
) -> None:
    """Write the file and compare it on all ``inputs``. Two sizes of input make the size dynamic."""
    import onnxruntime

    args = inputs[0]
    sizes = len(inputs) > 1
    program = export_program(exported, args, sizes=sizes)
    tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    outputs = program.graph_signature.user_outputs
    try:
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["input"] if len(tensors) == 1 else None,
            output_names=["output"]
            if len(outputs) == 1
            else [f"output_{i}" for i in range(len(outputs))],
            dynamic_shapes=pytree.tree_map(lambda v: _dim_names(v, sizes), args),
            custom_translation_table=missing_translations(),
            optimize=True,  # torch 2.6 does not do it unasked
        )
        assert converted is not None
        name_dims(converted.model, [_dim_names(t, sizes) or {} for t in tensors])
        written = converted.model.opset_imports[""]
        if opset not in (None, written):  # torch only logs that it could not convert
            raise ExportError(f"it stayed at opset {written}, not {opset}")
        converted.model.metadata_props.update(said)
        converted.save(path, external_data=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # two libraries complain about operations and dtypes they lack
        # Torch's own error says which step failed, and its cause says why.
        reason = first_line(error.__cause__ or error)[:200]
        raise ExportError(f"ONNX cannot hold {type(model).__name__} ({reason}).") from error
    names = [entry.name for entry in session.get_inputs()]

    def run(*values: Any) -> list[Tensor]:
        tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        feed = dict(zip(names, (t.numpy() for t in tensors), strict=True))
        try:
            return [torch.from_numpy(output) for output in session.run(None, feed)]
        except Exception as error:  # onnxruntime complains about a size the file does not take
            raise ExportError(f"the ONNX file fails ({first_line(error)[:200]}).") from error

    for values in inputs:
        check_equal(model, run, values, "the ONNX file")


def _dim_names(value: Any, sizes: bool) -> dict[int, str] | None:
    """The names of the dims of an input that :func:`export_program` makes dynamic."""
    if not isinstance(value, Tensor) or not value.dim():
        return None
    space = _DIMS.get(value.dim(), ()) if sizes and value.is_floating_point() else ()
    return {0: "batch"} | dict(zip(itertools.count(2), space, strict=False))


def _other_size(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The inputs with maps that are larger by 64 and 32, or None if the model does not take them.

    Networks halve their maps up to five times, and some need sides that are multiples of 32.
    """

    def larger(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dim() not in _DIMS:
            return value
        more = [64, 32][-min(2, value.dim() - 2) :]
        space = [*value.shape[2 : value.dim() - len(more)]]
        space += [side + n for side, n in zip(value.shape[-len(more) :], more, strict=True)]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(*value.shape[:2], *space, generator=generator, device="cpu")
        return x.to(value.dtype)

    other: tuple[Any, ...] = pytree.tree_map(larger, args)
    shapes = [
        [t.shape for t in pytree.tree_leaves(v) if isinstance(t, Tensor)] for v in (args, other)
    ]
    if shapes[0] == shapes[1]:
        return None
    try:
        with torch.no_grad():
            model(*other)
    except Exception:  # A foreign forward may raise anything. The network takes one size only.
        return None
    return other


def _metadata(model: nn.Module) -> dict[str, str]:
    """What the file says about itself: the network, r and the version."""
    config = getattr(model, "pretrained_cfg", None) or {}
    ratios = {
        f"{name}.{child}".lstrip("."): r
        for name, _, edit in injected(model)
        for child, r in zip(edit.children, edit.settings.r, strict=True)
    }
    same = len(set(ratios.values())) == 1
    return {
        "network": base_architecture(config.get("architecture") or type(model).__name__),
        "r": str(next(iter(ratios.values()))) if same else json.dumps(ratios),
        "se_inject": metadata.version("se-inject"),
    }


ONNX = Format(
    "an ONNX file", ".onnx", write_onnx, extra="onnx", write_optimized=write_optimized_onnx
)
