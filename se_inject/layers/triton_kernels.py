"""The Triton kernels that :mod:`se_inject.layers.kernels` launches.

Maps are dense: [N, C, P] in memory, or [N, P, C] (``LAST``), where P is the number of positions.
All sums are float32, and no result depends on the order in which the programs of a kernel run.
"""

import triton
import triton.language as tl


@triton.jit
def scale(
    x, gate, residual, shift, out, factor, C, P, chunks,
    LAST: tl.constexpr, RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x * (factor * gate)``, plus ``residual`` (a map) or ``shift`` ([N, C]) if there is one."""
    n = (tl.program_id(0) // chunks).to(tl.int64)
    at = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C * P
    c = n * C + (at % C if LAST else at // P)
    at = n * C * P + at
    y = tl.load(gate + c, mask=inside).to(tl.float32) * factor
    y *= tl.load(x + at, mask=inside).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + at, mask=inside).to(tl.float32)
    if SHIFT:
        y += tl.load(shift + c, mask=inside)
    tl.store(out + at, y, mask=inside)


@triton.jit
def excite(
    z, w1, b1, w2, b2, gate, hidden, factor, K, R, C,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The hidden vector [N, R] and the gate, ``factor`` times the sigmoid, [N, C] of the means."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    products = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (r[:, None] < R) & (k[None, :] < K)
        w = tl.load(w1 + r[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        products += w * tl.load(z + n * K + k, mask=k < K, other=0.0)[None, :]
    h = tl.sum(products, 1)
    if BIAS1:
        h += tl.load(b1 + r, mask=r < R, other=0.0).to(tl.float32)
    # A maximum would turn NaN into 0. Past R, an infinite mean times 0 is NaN.
    h = tl.where((h < 0) | (r >= R), 0.0, h)
    tl.store(hidden + n * R + r, h, mask=r < R)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        inside = (c[:, None] < C) & (r[None, :] < R)
        w = tl.load(w2 + c[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
        e = tl.sum(w * h[None, :], 1)
        if BIAS2:
            e += tl.load(b2 + c, mask=c < C, other=0.0).to(tl.float32)
        # A division that rounds to nearest: the sigmoid of 0 is 1/2 to the last bit.
        tl.store(gate + n * C + c, factor * tl.div_rn(1.0, 1.0 + tl.exp(-e)), mask=c < C)


@triton.jit
def products(
    x, grad, out, C, P, stride_c, stride_p, blocks, splits,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The sums of ``x * grad`` over the positions, [N, splits, C]: each over one part of them."""
    program = tl.program_id(0)
    split = program % splits
    c = (program // splits) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // splits // blocks).to(tl.int64)
    length = tl.cdiv(P, splits)
    end = tl.minimum(split * length + length, P)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(split * length, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c[:, None] < C) & (p[None, :] < end)
        at = n * C * P + c[:, None] * stride_c + p[None, :] * stride_p
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += a * tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (n * splits + split) * C + c, tl.sum(total, 1), mask=c < C)


@triton.jit
def excite_backward(
    sums, gate, hidden, w1, w2, of_e, of_h, of_x, C, R, P, factor, splits,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients before the sigmoid [N, C] and before the ReLU [N, R], and of each position.

    ``sums`` comes from :func:`products`. ``of_x`` [N, C] is what the mean passes to every
    position of a map.
    """
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    products = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        e = tl.zeros((BLOCK_C,), tl.float32)
        for split in range(splits):
            e += tl.load(sums + (n * splits + split) * C + c, mask=c < C, other=0.0)
        s = tl.load(gate + n * C + c, mask=c < C, other=0.0)
        e *= factor * s * (1 - s)
        tl.store(of_e + n * C + c, e, mask=c < C)
        inside = (c[:, None] < C) & (r[None, :] < R)
        w = tl.load(w2 + c[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
        products += w * e[:, None]
    h = tl.sum(products, 0)
    h = tl.where(tl.load(hidden + n * R + r, mask=r < R, other=0.0) > 0, h, 0.0)
    tl.store(of_h + n * R + r, h, mask=r < R)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (r[:, None] < R) & (c[None, :] < C)
        w = tl.load(w1 + r[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x + n * C + c, tl.sum(w * h[:, None], 0) / P, mask=c < C)
