"""An SE block and its addition on CUDA, as the kernels of :mod:`se_inject.layers.kernels`.

:func:`takes` says which maps they take. Everything else runs as PyTorch's operations: other devices
and dtypes, and everything that must see these operations (``torch.compile``, exporters, vmap,
forward derivatives, modes, subclasses of Tensor). ``torch.compile`` makes kernels of its own.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from se_inject.errors import warn
from se_inject.torch_private import (
    dispatch_modes_active,
    forward_derivatives_active,
    is_batched_by_old_vmap,
    is_tracing,
    transforms_active,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# From here on the layers are products of matrices, which read each weight once. The kernel reads
# all weights for each image (resnet50 with batches of 256 on an H100: 8.1 % over the base without
# this bound, 7.4 % with it).
MANY_PRODUCTS = 2**25
WIDEST = 1024  # the kernels keep one number per hidden unit and channel of a tile in registers
LARGEST = 2**31 - 1  # the kernels count the numbers of one image in int32


def takes(x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> bool:
    """Whether the kernels take the map ``x`` with the residual and with gates or parameters.

    The residual must have the shape, strides and dtype of ``x``, which is not asked here, and
    ``torch.compile`` must not be at work, which callers ask before anything else.
    """
    return (
        type(x) is Tensor
        and x.is_cuda
        and x.dtype in DTYPES
        and not is_tracing()  # It would warn of the questions about sizes that follow.
        and x.numel() > 0
        and x.numel() // x.shape[0] <= LARGEST
        and (
            x.is_contiguous()
            or (x.dim() in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()]))
        )
        and (residual is None or (type(residual) is Tensor and residual.device == x.device))
        and all(
            v is None
            or (
                type(v) in PLAIN
                and v.is_contiguous()
                and v.dtype in DTYPES
                and v.device == x.device
            )
            for v in vectors
        )
        and not transforms_active()
        and not forward_derivatives_active()
        and not dispatch_modes_active()
        and (x.get_device() in _RUN_ON or _kernels_run(x.get_device()))
    )


def takes_layers(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> bool:
    """Whether the two layers are matrices [R, K] and [C, R] for the K channels of ``x``.

    The kernels do not ask, and would read what lies behind a parameter that is too small. Where
    the answer is no, PyTorch's operations raise their error.
    """
    bottleneck, channels = w1.shape[0], w2.shape[0]
    return (
        bottleneck <= WIDEST
        and w1.numel() == bottleneck * x.shape[1]
        and w2.numel() == channels * bottleneck
        and (b1 is None or b1.numel() == bottleneck)
        and (b2 is None or b2.numel() == channels)
    )


def takes_gate(x: Tensor, residual: Tensor, gate: Tensor) -> bool:
    """Whether :func:`scale_add` takes these maps, which agree in strides and dtype.

    Maps of different shapes can agree in strides: one is then broadcast over the batch.
    """
    return (
        x.is_cuda
        and x.shape == residual.shape
        and x.dim() > 2
        and gate.numel() == x.shape[0] * x.shape[1]
        and gate.shape[:2] == x.shape[:2]
        and takes(x, residual, gate)
    )


def excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    factor: float,
) -> Tensor:
    """Compute ``factor * sigmoid(w2 relu(w1 mean(x) + b1) + b2)`` [N, C], without autograd.

    ``x`` has as many channels as ``w1`` takes, and the gate has as many as ``w2`` gives. It has the
    dtype of ``x``.
    """
    from se_inject.layers import kernels

    with torch.cuda.device(x.get_device()):
        z = x.mean(tuple(range(2, x.dim())), dtype=torch.float32)
        return kernels.excite(z, w1, b1, w2, b2, factor, x.dtype)[0]


def scale_add(x: Tensor, residual: Tensor, gate: Tensor, factor: float, in_place: bool) -> Tensor:
    """Compute ``residual + x * (factor * gate)``, without autograd."""
    from se_inject.layers import kernels

    with torch.cuda.device(x.get_device()):
        return kernels.scale(x, gate, factor, residual, out=_written(x) if in_place else None)


# The devices on which the kernels have run, and those on which they cannot.
_RUN_ON: set[int] = set()
_NOT_ON: set[int] = set()


def _kernels_run(device: int) -> bool:
    """Whether Triton is here and its kernels run on the device. The answer is kept.

    Triton needs a C compiler at run time, which not every machine has.
    """
    if device in _NOT_ON or torch.version.cuda is None:
        return False
    if torch.cuda.is_current_stream_capturing():  # Compiling would break the graph.
        return False
    x = torch.ones(1, 1, 1, device=torch.device("cuda", device))
    try:
        from se_inject.layers import kernels

        with torch.cuda.device(device):
            right = kernels.scale(x, x, 2.0).item() == 2
        reason = "a kernel computed something else"
    except Exception as error:  # whatever the compiler and the driver raise
        right = False
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    (_RUN_ON if right else _NOT_ON).add(device)
    if not right:
        warn(
            f"the kernels of SE blocks do not run here: {reason}. The blocks use PyTorch's own"
            " operations, which are slower and compute the same"
        )
    return right


def squeeze_excite(
    x: Tensor,
    residual: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    factor: float,
    in_place: bool = False,
) -> Tensor:
    """Compute ``x * (factor * sigmoid(w2 relu(w1 mean(x) + b1) + b2)) + residual``.

    The mean, the layers and the gate are float32 for every dtype of ``x``, under autocast too.

    Args:
        x, residual: maps that :func:`takes` accepts, [N, C, *space], or no residual.
        w1, b1, w2, b2: see :func:`se_inject.layers.kernels.excite`; 1x1 kernels may follow.
        in_place: whether the result is written to the memory of ``x`` where autograd allows it.
    """
    with torch.cuda.device(x.get_device()):  # Triton launches on the current device.
        inputs = (x, residual, w1, b1, w2, b2)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            apply: Any = _SqueezeExcite.apply  # torch declares no types for it
            total: Tensor = apply(*inputs, factor)
            return total
        return _forward(*inputs, factor, in_place and not torch.is_grad_enabled())[0]


def _forward(
    x: Tensor,
    residual: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    factor: float,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from se_inject.layers import kernels

    z = x.mean(tuple(range(2, x.dim())), dtype=torch.float32)
    excite = kernels.excite if len(z) * w1.numel() < MANY_PRODUCTS else _excite
    gate, hidden = excite(z, w1, b1, w2, b2)
    total = kernels.scale(x, gate, factor, residual, out=_written(x) if in_place else None)
    return total, z, gate, hidden


def _written(x: Tensor) -> Tensor:
    """``x``, after autograd has been told that a kernel overwrites it.

    A graph that has kept ``x`` then refuses to use it, as after an operation in place.
    """
    increment_version(x)
    return x


def _excite(
    z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same as :func:`se_inject.layers.kernels.excite`, by PyTorch's operations."""
    with _without_autocast():
        hidden = torch.relu(F.linear(z, w1.flatten(1).float(), b1 if b1 is None else b1.float()))
        excited = F.linear(hidden, w2.flatten(1).float(), b2 if b2 is None else b2.float())
        return excited.sigmoid(), hidden


def _excite_backward(
    sums: Tensor,
    gate: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    factor: float,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`se_inject.layers.kernels.excite_backward`, by PyTorch's operations."""
    of_e = sums.sum(1) * (factor * gate * (1 - gate))
    of_h = (of_e @ w2.flatten(1).float()) * (hidden > 0)
    return of_e, of_h, of_h @ w1.flatten(1).float() / positions


def _without_autocast() -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled("cuda"):
        return torch.autocast("cuda", enabled=False)
    return nullcontext()


class _SqueezeExcite(torch.autograd.Function):
    """The block with a backward pass that reads the maps three times and writes one new map."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, residual, w1, b1, w2, b2, ctx.factor = inputs
        total, z, gate, hidden = _forward(x, residual, w1, b1, w2, b2, ctx.factor, False)
        ctx.save_for_backward(x, w1, b1, w2, b2, z, gate, hidden)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from se_inject.layers import kernels

        x, w1, b1, w2, b2, z, gate, hidden = ctx.saved_tensors
        parameters = (w1, b1, w2, b2)
        of_x, of_residual, *needed, _ = ctx.needs_input_grad
        passed = grad if of_residual else None
        if not of_x and not any(needed):
            return None, passed, *(None,) * 5
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or transforms_active()
            or is_batched_by_old_vmap(grad)
        ):
            found, *made = _differentiable(x, parameters, ctx.factor, grad)
            return found if of_x else None, passed, *_as_parameters(made, parameters, needed), None
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        with torch.cuda.device(x.get_device()), _without_autocast():
            sums = kernels.products(x, grad)
            few = len(z) * w1.numel() < MANY_PRODUCTS
            back = kernels.excite_backward if few else _excite_backward
            positions = x.numel() // z.numel()
            of_e, of_h, shift = back(sums, gate, hidden, w1, w2, ctx.factor, positions)
            of_map = kernels.scale(grad, gate, ctx.factor, shift=shift) if of_x else None
            grads: Sequence[Tensor | None] = (None,) * 4
            if any(needed):
                grads = _as_parameters(_of_layers(z, hidden, of_e, of_h), parameters, needed)
        return of_map, passed, *grads, None


def _of_layers(z: Tensor, hidden: Tensor, of_e: Tensor, of_h: Tensor) -> tuple[Tensor, ...]:
    """The gradients of ``w1``, ``b1``, ``w2`` and ``b2`` as matrices and vectors in float32."""
    return of_h.t() @ z, of_h.sum(0), of_e.t() @ hidden, of_e.sum(0)


def _as_parameters(
    grads: Sequence[Tensor], parameters: Sequence[Any], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients that are needed, with the dtypes and shapes of their parameters."""
    return [
        g.to(p.dtype).view_as(p) if need else None
        for g, p, need in zip(grads, parameters, needed, strict=True)
    ]


def _differentiable(
    x: Tensor, parameters: Sequence[Any], factor: float, grad: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of ``x`` and of the layers, by operations that autograd and vmap know.

    The formulas are written out, because a call of ``torch.autograd.grad`` here would run the hooks
    of ``x`` and of the parameters once more.
    """
    space = tuple(range(2, x.dim()))
    w1, _, w2, _ = parameters
    with _without_autocast():
        z = x.mean(space, dtype=torch.float32)
        gate, hidden = _excite(z, *parameters)
        sums = (x.float() * grad.float()).sum(space)[:, None]
        positions = x.numel() // z.numel()
        of_e, of_h, shift = _excite_backward(sums, gate, hidden, w1, w2, factor, positions)
        gate, shift = (v[(..., *(None,) * len(space))] for v in (factor * gate, shift))
        of_map = (grad.float() * gate + shift).to(x.dtype)
        return of_map, *_of_layers(z, hidden, of_e, of_h)
