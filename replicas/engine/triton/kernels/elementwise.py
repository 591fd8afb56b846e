"""The small operations of a decoder layer, with the roundings of `ops.TorchOps`."""

import triton
import triton.language as tl

from replicas.engine.triton.kernels.early import wait_for_others


@triton.jit(do_not_specialize=["rows"])
def rms_norm(
    x,
    residual,
    weight,
    out,
    rows,
    x_stride,
    eps,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (ceil(rows / ROWS),). out = norm(x) * weight; with ADD of x + residual, which also replaces residual.

    out and residual are contiguous [rows, WIDTH]; out may be x.
    """
    wait_for_others(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    at = row[:, None] * WIDTH + cols[None, :]
    value = tl.load(x + row[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(residual + at, value, mask=mask)
    wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / WIDTH
    normed = (wide * tl.rsqrt(mean + eps)[:, None]).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * factor[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rope(
    q,
    k,
    cos_sin,
    positions,
    q_heads,
    k_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    HALF_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (T, ceil(q_heads / HEADS) + ceil(k_heads / HEADS)), in place."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(q_heads, HEADS)
    dims = tl.arange(0, HALF)
    row = cos_sin + tl.load(positions + token) * (2 * HALF_DIM)
    cos = tl.load(row + dims, mask=dims < HALF_DIM, other=0.0)[None, :]
    sin = tl.load(row + HALF_DIM + dims, mask=dims < HALF_DIM, other=0.0)[None, :]
    if part < q_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        mask = (heads < q_heads)[:, None] & (dims < HALF_DIM)[None, :]
        at = q + token * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, (first * cos - second * sin).to(q.dtype.element_ty), mask=mask)
        tl.store(at + HALF_DIM, (second * cos + first * sin).to(q.dtype.element_ty), mask=mask)
    else:
        heads = (part - q_parts) * HEADS + tl.arange(0, HEADS)
        mask = (heads < k_heads)[:, None] & (dims < HALF_DIM)[None, :]
        at = k + token * k_token_stride + heads[:, None] * k_head_stride + dims[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, (first * cos - second * sin).to(k.dtype.element_ty), mask=mask)
        tl.store(at + HALF_DIM, (second * cos + first * sin).to(k.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul(gate_up, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Grid (T, ceil(width / BLOCK)): silu of the first half of a row times the second."""
    wait_for_others(EARLY)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(gate_up + row * 2 * width + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + cols, mask=mask, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + cols, (activated * up).to(out.dtype.element_ty), mask=mask)
