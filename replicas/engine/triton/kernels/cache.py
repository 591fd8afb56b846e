"""Keys and values into the paged cache, as they are or rounded to 8 bits; with rotary embeddings on the way if asked.

A tile is [HEADS, HALF]: the first or the second half of a few heads of one token, so that a rotation needs no exchange
between lanes. The arithmetic is that of `kv_format.KVFormat.encode` and `ops.TorchOps.rope`, rounding included.
"""

import triton
import triton.language as tl
from triton.language import math as tlm

from replicas.engine.triton.kernels.early import wait_for_others


@triton.jit
def _scale_for(largest, LARGEST: tl.constexpr):
    """The scale with which magnitudes up to `largest` become codes up to LARGEST."""
    scale = tlm.div_rn(largest, tl.zeros_like(largest) + LARGEST)
    # 2^-120: a vector of denormals must not be divided by zero.
    return tl.where(scale == 0.0, 1.0, tl.maximum(scale, 7.52316384526264e-37))


@triton.jit
def _encode(x, scales, CODE: tl.constexpr, SATURATE: tl.constexpr, LARGEST: tl.constexpr):
    """Codes int8 of x float32 [HEADS, HALF] over scales [HEADS]: to the nearest, ties to even.

    SATURATE: numbers beyond LARGEST scales become the greatest code; without it there must be none.
    """
    y = tlm.div_rn(x, scales[:, None] + tl.zeros_like(x))
    if SATURATE:
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if CODE == 1:
        # 1.5 * 2^23 has steps of 1: the addition rounds.
        return (y + 12582912.0 - 12582912.0).to(tl.int32).to(tl.int8)
    else:
        bits = y.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        # Normal: keep 3 bits of the mantissa, rounded, and move the exponent's bias from 127 to 7.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the grid has even steps of 2^-9; so has float32 from 2^14 on.
        magnitude = size.to(tl.float32, bitcast=True)
        subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0.015625, subnormal, normal)
        return (code | sign).to(tl.int8)


@triton.jit
def _store(
    first,
    second,
    target,
    scales,
    slot,
    heads,
    mask,
    block_stride,
    token_stride,
    head_stride,
    scale_block_stride,
    scale_token_stride,
    CODE: tl.constexpr,
    FIXED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """Two halves (float32 [HEADS, HALF]) of one token's heads to its slot. FIXED: scales are there, none is written."""
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    dims = tl.arange(0, HALF)
    at = target + block * block_stride + offset * token_stride + heads[:, None] * head_stride + dims[None, :]
    if CODE == 0:
        tl.store(at, first.to(target.dtype.element_ty), mask=mask)
        tl.store(at + HALF_DIM, second.to(target.dtype.element_ty), mask=mask)
    else:
        # Of every row of the mask the first column is inside if the head is.
        there = tl.max(mask.to(tl.int32), axis=1) > 0
        scale_at = scales + block * scale_block_stride + offset * scale_token_stride + heads
        if FIXED:
            scale = tl.load(scale_at, mask=there, other=1.0)
        else:
            scale = _scale_for(tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1)), LARGEST)
            tl.store(scale_at, scale, mask=there)
        tl.store(at, _encode(first, scale, CODE, FIXED, LARGEST), mask=mask)
        tl.store(at + HALF_DIM, _encode(second, scale, CODE, FIXED, LARGEST), mask=mask)


@triton.jit
def rope_and_write(
    q,
    k,
    v,
    cos_sin,
    positions,
    slots,
    keys,
    values,
    key_scales,
    value_scales,
    q_heads,
    kv_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    key_block_stride,
    value_block_stride,
    token_stride,
    head_stride,
    scale_block_stride,
    scale_token_stride,
    ROTATE: tl.constexpr,
    CODE: tl.constexpr,
    FIXED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (T, ceil(q_heads / HEADS) + 2 ceil(kv_heads / HEADS)): q is rotated in place, k and v go to their slots.

    Without ROTATE there are no programs for q: the grid is (T, 2 ceil(kv_heads / HEADS)).
    """
    wait_for_others(EARLY)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, HALF)
    kv_parts = tl.cdiv(kv_heads, HEADS)
    cos = tl.full([1, HALF], 1.0, dtype=tl.float32)
    sin = tl.zeros([1, HALF], dtype=tl.float32)
    q_parts = 0
    if ROTATE:
        q_parts = tl.cdiv(q_heads, HEADS)
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
        slot = tl.load(slots + token)
        if part < q_parts + kv_parts:
            heads = (part - q_parts) * HEADS + tl.arange(0, HEADS)
            mask = (heads < kv_heads)[:, None] & (dims < HALF_DIM)[None, :]
            at = k + token * k_token_stride + heads[:, None] * k_head_stride + dims[None, :]
            first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(at + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
            if ROTATE:
                turned = (first * cos - second * sin).to(k.dtype.element_ty).to(tl.float32)
                second = (second * cos + first * sin).to(k.dtype.element_ty).to(tl.float32)
                first = turned
            _store(
                first, second, keys, key_scales, slot, heads, mask, key_block_stride, token_stride, head_stride,
                scale_block_stride, scale_token_stride, CODE, FIXED, LARGEST, BLOCK_SIZE, HALF_DIM, HALF,
            )  # fmt: skip
        else:
            heads = (part - q_parts - kv_parts) * HEADS + tl.arange(0, HEADS)
            mask = (heads < kv_heads)[:, None] & (dims < HALF_DIM)[None, :]
            at = v + token * v_token_stride + heads[:, None] * v_head_stride + dims[None, :]
            first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(at + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
            _store(
                first, second, values, value_scales, slot, heads, mask, value_block_stride, token_stride, head_stride,
                scale_block_stride, scale_token_stride, CODE, FIXED, LARGEST, BLOCK_SIZE, HALF_DIM, HALF,
            )  # fmt: skip


@triton.jit
def round_queries(
    q,
    codes,
    scales,
    query_start,
    q_token_stride,
    q_head_stride,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (sequences, KV heads): e4m3 codes of a sequence's queries of one KV head, over one scale for all of them.

    q [T, Hq, D] -> codes int8 [T, Hq, D] and scales float32 [S, Hk]. ROWS (token, query head) pairs are taken at once.
    """
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(query_start + seq)
    pairs = (tl.load(query_start + seq + 1) - first) * GROUP
    dims = tl.arange(0, BLOCK_D)
    largest = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, pairs, ROWS):
        pair = start + tl.arange(0, ROWS)
        mask = (pair < pairs)[:, None] & (dims < HEAD_DIM)[None, :]
        at = (first + pair // GROUP).to(tl.int64) * q_token_stride + (kv_head * GROUP + pair % GROUP) * q_head_stride
        x = tl.load(q + at[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    # One number in all rows.
    scale = _scale_for(tl.zeros([ROWS], dtype=tl.float32) + tl.max(largest, axis=0), LARGEST)
    for start in range(0, pairs, ROWS):
        pair = start + tl.arange(0, ROWS)
        mask = (pair < pairs)[:, None] & (dims < HEAD_DIM)[None, :]
        token = (first + pair // GROUP).to(tl.int64)
        head = kv_head * GROUP + pair % GROUP
        at = token * q_token_stride + head * q_head_stride
        x = tl.load(q + at[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        out = (token * (tl.num_programs(1) * GROUP) + head) * HEAD_DIM
        tl.store(codes + out[:, None] + dims[None, :], _encode(x, scale, 2, True, LARGEST), mask=mask)
    tl.store(scales + seq * tl.num_programs(1) + kv_head, tl.max(scale, axis=0))
