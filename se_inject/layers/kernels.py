"""Launches the Triton kernels of an SE block: as few passes over its maps as can be, for CUDA.

PyTorch's own operations broadcast a gate over a map at half the bandwidth of the device, and the
layers take ten launches. ``benchmarks/README.md`` has figures. The module needs Triton, which
PyTorch installs with CUDA. :mod:`se_inject.layers.fused` imports it where there is a GPU.
"""

import torch
import triton
from torch import Tensor

from se_inject.layers import triton_kernels


def scale(
    x: Tensor,
    gate: Tensor,
    factor: float,
    residual: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute ``x * (factor * gate) + residual + shift`` in one pass.

    Args:
        x, residual: dense maps of the same shape, strides and dtype.
        gate: N*C numbers, contiguous.
        shift: N*C numbers in float32, contiguous, or None.
        out: where the result goes (it may be ``x``); by default a new map.
    """
    n, channels, positions = _sizes(x)
    out = torch.empty_like(x) if out is None else out
    chunks = triton.cdiv(channels * positions, 1024)
    triton_kernels.scale[(n * chunks,)](
        x,
        gate,
        x if residual is None else residual,
        gate if shift is None else shift,
        out,
        factor,
        channels,
        positions,
        chunks,
        LAST=_channels_last(x),
        RESIDUAL=residual is not None,
        SHIFT=shift is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return out


def excite(
    z: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute ``factor * sigmoid(w2 h + b2)`` [N, C] and ``h = relu(w1 z + b1)`` [N, R].

    Args:
        z: the means [N, K] of a map, in float32.
        w1, b1, w2, b2: the parameters of the two layers, [R, K], [R], [C, R] and [C], contiguous.
            Each bias may be None.
        dtype: that of the gate. ``h`` is float32.
    """
    n, inputs = z.shape
    bottleneck, channels = w1.shape[0], w2.shape[0]
    gate = z.new_empty(n, channels, dtype=dtype)
    hidden = z.new_empty(n, bottleneck)
    block_k, block_r = _blocks(bottleneck)
    triton_kernels.excite[(n,)](
        z,
        w1,
        z if b1 is None else b1,
        w2,
        z if b2 is None else b2,
        gate,
        hidden,
        factor,
        inputs,
        bottleneck,
        channels,
        BIAS1=b1 is not None,
        BIAS2=b2 is not None,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=8,
    )
    return gate, hidden


def products(x: Tensor, grad: Tensor) -> Tensor:
    """The sums of ``x * grad`` over the positions, [N, splits, C]: each over one part of them.

    Both maps have the same strides.
    """
    n, channels, positions = _sizes(x)
    last = _channels_last(x)
    # Along the dim that is dense in memory, a tile has 64 numbers or more.
    block_p = 32 if last else min(512, triton.next_power_of_2(positions))
    block_c = 64 if last else 2048 // block_p
    blocks = triton.cdiv(channels, block_c)
    # About a thousand programs keep all of the device's multiprocessors busy.
    splits = min(8, triton.cdiv(positions, block_p), max(1, 1024 // (n * blocks)))
    sums = torch.empty(n, splits, channels, device=x.device)
    triton_kernels.products[(n * blocks * splits,)](
        x,
        grad,
        sums,
        channels,
        positions,
        1 if last else positions,
        channels if last else 1,
        blocks,
        splits,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
    )
    return sums


def excite_backward(
    sums: Tensor,
    gate: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    factor: float,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [N, C] before the sigmoid, [N, R] before the ReLU and [N, C] of a position.

    Args:
        sums: the gradient of ``factor * gate``, as :func:`products` returns it.
        gate, hidden: what :func:`excite` returned, for the factor 1.
        w1, w2: see :func:`excite`.
    """
    (n, splits, channels), bottleneck = sums.shape, w1.shape[0]
    of_e, of_x, of_h = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(hidden)
    block_c, block_r = _blocks(bottleneck)
    triton_kernels.excite_backward[(n,)](
        sums,
        gate,
        hidden,
        w1,
        w2,
        of_e,
        of_h,
        of_x,
        channels,
        bottleneck,
        positions,
        factor,
        splits,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        num_warps=8,
    )
    return of_e, of_h, of_x


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """N, C and the number of positions."""
    n, channels = x.shape[:2]
    return n, channels, x.numel() // (n * channels)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()  # and it is dense


def _blocks(bottleneck: int) -> tuple[int, int]:
    """The sides of a tile of a weight: all of R, and as much of C as the registers hold."""
    block_r: int = triton.next_power_of_2(bottleneck)
    return max(16, 4096 // block_r), block_r
