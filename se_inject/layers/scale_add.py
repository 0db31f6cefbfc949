"""``residual + x * s``: the sum that an SE block ends in, in one pass over the maps."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from se_inject.layers import fused
from se_inject.torch_private import is_batched_by_old_vmap, is_tracing, transforms_active


def scale_add(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    factor: float = 1.0,
    residual_first: bool = False,
    in_place: bool = False,
) -> Tensor:
    """Compute ``residual + x * (factor * gate)`` without writing the product to memory.

    Args:
        residual, x: maps, such as [N, C, H, W].
        gate: such as [N, C, 1, 1]. It is broadcast to ``x``.
        factor: a power of two, so that rounding does not depend on where it is multiplied in.
        residual_first: whether the sum replaces ``residual + x`` and not ``x + residual``. If the
            two maps differ in memory format, the sum has the format of its first operand, and the
            product is written to memory after all.
        in_place: whether the sum replaces ``x += residual``. Such a sum keeps the dtype of ``x``.
            It is written to the memory of ``x`` as before, unless autograd needs that memory.
    """
    if x.stride() != residual.stride() or x.dtype != residual.dtype:
        product = x * times(gate, factor)
        return product.add_(residual) if in_place else add(product, residual, residual_first)
    # TorchScript takes no autograd.Function. is_scripting is public but not in torch's __all__.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return torch.addcmul(residual, x, gate, value=factor)
    return _scale_add(residual, x, gate, factor, in_place)


def add(
    product: Tensor, residual: Tensor, residual_first: bool = False, in_place: bool = False
) -> Tensor:
    """The sum of a scaled map and its residual, in new memory.

    The product is not overwritten, because a hook may hold it. The flags are those of
    :func:`scale_add`.
    """
    total = residual + product if residual_first else product + residual
    if in_place and total.dtype != product.dtype:
        return total.to(product.dtype)
    return total


def _scale_add(residual: Tensor, x: Tensor, gate: Tensor, factor: float, in_place: bool) -> Tensor:
    """The same for two maps that agree in memory format and dtype."""
    # A subclass of Tensor turns the output of a Function into a view, which may not be changed.
    plain = type(residual) is Tensor and type(x) is Tensor and type(gate) is Tensor
    # TorchScript's tracer has no rule for a Function either.
    if not plain or torch.compiler.is_compiling() or is_tracing() or transforms_active():
        return torch.addcmul(residual, x, gate, value=factor)
    # A gate that differs at every position is as large as the map, and its gradient needs no sum.
    if torch.is_grad_enabled() and gate.requires_grad and gate.shape != x.shape:
        total: Tensor = _ScaleAdd.apply(residual, x, gate, factor)
        return total
    in_place = in_place and (x.is_inference() or _without_autograd(residual, x, gate))
    if not torch.is_grad_enabled() and fused.takes_gate(x, residual, gate):
        return fused.scale_add(x, residual, gate, factor, in_place)
    if in_place:
        return torch.addcmul(residual, x, gate, value=factor, out=x)
    return torch.addcmul(residual, x, gate, value=factor)


def times(gate: Tensor, factor: float) -> Tensor:
    """``factor * gate``, or the gate itself where that is the same."""
    return gate if factor == 1.0 else gate * factor


class _ScaleAdd(torch.autograd.Function):
    """``addcmul`` with a backward pass that needs one new map instead of three.

    The gradient of the gate is the sum over a product, and the gradient of ``x`` is then written
    over that product. Besides ``x`` only the gate is kept, and a sigmoid keeps that anyway.
    """

    @staticmethod
    def forward(residual: Tensor, x: Tensor, gate: Tensor, factor: float) -> Tensor:
        return torch.addcmul(residual, x, gate, value=factor)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor
    ) -> None:
        _, x, gate, ctx.factor = inputs
        ctx.save_for_backward(x, gate)
        ctx.save_for_forward(x, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, gate = ctx.saved_tensors
        product = grad * x
        of_gate = times(product.sum_to_size(gate.shape), ctx.factor)
        of_x = None
        if ctx.needs_input_grad[1]:
            s = times(gate, ctx.factor)
            # The order matters: compiled autograd traces the first question but not the others.
            if (
                torch.compiler.is_compiling()
                or torch.is_grad_enabled()
                or transforms_active()
                or is_batched_by_old_vmap(grad)
            ):
                of_x = grad * s
            else:
                of_x = torch.mul(grad, s, out=product)
        return grad, of_x, of_gate, None

    @staticmethod
    def jvp(ctx: Any, residual: Tensor, x: Tensor, gate: Tensor, _: None) -> Tensor:
        saved_x, saved_gate = ctx.saved_tensors
        of_product: Tensor = x * saved_gate + saved_x * gate
        return residual + times(of_product, ctx.factor)


def _without_autograd(*tensors: Tensor) -> bool:
    """Whether neither autograd nor forward AD records. Both have no rule for ``out=``."""
    if torch.is_grad_enabled():
        return False
    unpack: Any = forward_ad.unpack_dual  # torch declares no types for it
    return all(unpack(t).tangent is None for t in tensors)
