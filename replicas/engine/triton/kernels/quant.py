"""Products with weights of 2, 4 or 8 bits. `replicas.engine.triton.quant` packs them and chooses among the kernels.

Layout of the codes of a weight [N, K]: bytes [N, ceil(K / S) * PLANE] with S = PLANE * 8 / BITS inputs a step. Byte j
of step s holds inputs s * S + p * PLANE + j, p = 0, 1, … from its low bits up: a load of PLANE bytes a row gives, by a
shift each, 8 / BITS tiles of PLANE neighbouring inputs, and nothing has to be interleaved.

    4 bits, PLANE 32:   byte 0  = [input 32 | input 0]   byte 1  = [input 33 | input 1]  …  byte 31 = [63 | 31]

A tile lies in one group, so its scale multiplies the sum and not each weight:
    y += scale * (x · (code - MIDDLE)) + origin * sum(x)
with MIDDLE = 2^(BITS - 1). ORIGIN 0: none. 1: from zero points, origin = scale * (MIDDLE - zero). 2: from minima,
origin = min + scale * MIDDLE. scales and origins are [G, N].
"""

import triton
import triton.language as tl


@triton.jit
def _numbers(raw, plane: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """code - 2^(BITS - 1), exactly, of one plane of loaded bytes."""
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    code = (raw >> (plane * BITS)) & ((1 << BITS) - 1)
    if DOT == tl.bfloat16 and BITS <= 4:
        # 0x4300 is 128 and its last bit counts 1: the bits of 128 + code, without a conversion of integers.
        return (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + MIDDLE)
    elif DOT == tl.float16:
        return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + MIDDLE)
    else:
        return (code.to(tl.int16) - MIDDLE).to(DOT)


@triton.jit
def _origin(scale, origins, at, mask, BITS: tl.constexpr, ORIGIN: tl.constexpr):
    stored = tl.load(origins + at, mask=mask, other=0).to(tl.float32)
    if ORIGIN == 1:
        return scale * ((1 << (BITS - 1)) - stored)
    else:
        return stored + scale * (1 << (BITS - 1))


@triton.jit
def few_rows(
    x,
    packed,
    scales,
    origins,
    parts,
    x_stride,
    N,
    K,
    steps,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (ceil(N / BLOCK_N), splits): without tensor cores, x [ROWS, K]; parts [splits, ROWS, N] of float32."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, ROWS)
    inside = n < N
    acc = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    share = tl.cdiv(steps, tl.num_programs(1))
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        byte = step * PLANE + tl.arange(0, PLANE)
        at = n.to(tl.int64)[:, None] * row_bytes + byte[None, :]
        raw = tl.load(packed + at, mask=inside[:, None], other=0)
        for plane in tl.static_range(8 // BITS):
            first = (step * (8 // BITS) + plane) * PLANE
            k = first + tl.arange(0, PLANE)
            xs = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
            weights = _numbers(raw, plane, BITS, tl.float32)
            group = tl.minimum(first // GROUP, groups - 1)
            scale = tl.load(scales + group * N + n, mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(xs[:, None, :] * weights[None, :, :], axis=2) * scale[None, :]
            if ORIGIN != 0:
                origin = _origin(scale, origins, group * N + n, inside, BITS, ORIGIN)
                acc += tl.sum(xs, axis=1)[:, None] * origin[None, :]
    at = (split * ROWS + rows)[:, None] * N + n[None, :]
    tl.store(parts + at, acc, mask=inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def some_rows(
    x,
    packed,
    scales,
    origins,
    parts,
    x_stride,
    rows,
    N,
    K,
    steps,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (ceil(N / BLOCK_N), splits): x [rows <= BLOCK_M, K]; parts [splits, rows, N] of float32."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    inside = n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    share = tl.cdiv(steps, tl.num_programs(1))
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        byte = step * PLANE + tl.arange(0, PLANE)
        at = n.to(tl.int64)[None, :] * row_bytes + byte[:, None]
        raw = tl.load(packed + at, mask=inside[None, :], other=0)
        for plane in tl.static_range(8 // BITS):
            first = (step * (8 // BITS) + plane) * PLANE
            k = first + tl.arange(0, PLANE)
            xs = tl.load(x + m[:, None] * x_stride + k[None, :], mask=(m < rows)[:, None] & (k < K)[None, :], other=0.0)
            weights = _numbers(raw, plane, BITS, DOT)
            group = tl.minimum(first // GROUP, groups - 1)
            scale = tl.load(scales + group * N + n, mask=inside, other=0.0).to(tl.float32)
            acc += tl.dot(xs.to(DOT), weights, input_precision=PRECISION) * scale[None, :]
            if ORIGIN != 0:
                origin = _origin(scale, origins, group * N + n, inside, BITS, ORIGIN)
                acc += tl.sum(xs.to(tl.float32), axis=1)[:, None] * origin[None, :]
    at = (split * rows + m)[:, None] * N + n[None, :]
    tl.store(parts + at, acc, mask=(m < rows)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["splits", "rows"])
def add_parts(parts, bias, out, splits, rows, N, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, ceil(N / BLOCK)): out = the sum of parts [splits, rows, N] (+ bias)."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + (split * rows + row) * N + n, mask=mask, other=0.0)
    if BIASED:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantise(
    packed,
    scales,
    origins,
    out,
    N,
    K,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (ceil(N / BLOCK_N), steps): the weight [N, K] in out's type."""
    step = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    byte = step * PLANE + tl.arange(0, PLANE)
    raw = tl.load(packed + n.to(tl.int64)[:, None] * row_bytes + byte[None, :], mask=inside[:, None], other=0)
    for plane in tl.static_range(8 // BITS):
        first = (step * (8 // BITS) + plane) * PLANE
        k = first + tl.arange(0, PLANE)
        group = tl.minimum(first // GROUP, groups - 1)
        scale = tl.load(scales + group * N + n, mask=inside, other=0.0).to(tl.float32)
        weights = _numbers(raw, plane, BITS, tl.float32) * scale[:, None]
        if ORIGIN != 0:
            weights += _origin(scale, origins, group * N + n, inside, BITS, ORIGIN)[:, None]
        at = out + n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(at, weights.to(out.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])
