"""What torch 2.6 leaves undone when it writes ONNX. Newer versions do all of this themselves."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from se_inject.torch_private import knows_eval_norms_in_onnx


def missing_translations() -> dict[Callable[..., Any], Callable[..., Any]] | None:
    """The operations that this version of torch cannot write, each with what writes it."""
    if knows_eval_norms_in_onnx():
        return None
    return {torch.ops.aten._native_batch_norm_legit_no_training.default: _eval_batch_norm}


# The exporter reads the names of the parameters: they are those of torch's operation.
def _eval_batch_norm(
    input: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any]:
    """A batch norm in eval mode, which has one output in ONNX.

    Old versions of torch give it the three outputs of train mode, and no runtime takes such a file.
    """
    import onnxscript

    op: Any = onnxscript.opset18

    def filled(value: float) -> Any:
        one = op.CastLike(op.Constant(value_floats=[value]), running_mean)
        return op.Expand(one, op.Shape(running_mean))

    normed = op.BatchNormalization(
        input,
        filled(1.0) if weight is None else weight,
        filled(0.0) if bias is None else bias,
        running_mean,
        running_var,
        epsilon=eps,
        momentum=1 - momentum,
    )
    first = normed[0] if isinstance(normed, Sequence) else normed
    first.producer().resize_outputs(1)
    return (first,)


def name_dims(model: Any, names: Sequence[dict[int, str]]) -> None:
    """Give the dynamic dims of an ONNX model their names, where torch has left its own (``s0``).

    Args:
        model: the ``onnx_ir.Model``, which is changed in place.
        names: of each input, its dynamic dims.
    """
    new: dict[str, str] = {}
    for value, wanted in zip(model.graph.inputs, names, strict=False):
        for dim, name in wanted.items():
            old = getattr(value.shape[dim], "value", None)
            if isinstance(old, str):
                new.setdefault(old, name)
    if all(old == name for old, name in new.items()):
        return
    # Dims inside the network are sums and products of these: ``s1//4``.
    symbol = re.compile("|".join(rf"\b{re.escape(old)}\b" for old in new))
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        for i, dim in enumerate(value.shape or ()):
            if isinstance(text := getattr(dim, "value", None), str):
                value.shape[i] = symbol.sub(lambda match: new[match[0]], text)
