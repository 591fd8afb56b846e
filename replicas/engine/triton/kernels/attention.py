"""Paged attention. See `replicas.engine.triton.attention` for how the kernels are launched.

Rows of a program's tile are (token, query head) pairs of one KV head: row m is query token m // GROUP and query head
kv_head * GROUP + m % GROUP, so that a key is read once for all query heads that share it.

Softmax is online (Dao et al. 2022, arXiv:2205.14135) and in base 2: scores come multiplied by log2(e). The split of a
sequence over programs and the merge after it follow Flash-Decoding (Dao et al. 2023); locating a program's sequence by
a binary search over a packed batch follows vLLM's unified Triton kernel.

CODE says how keys and values are stored: 0 as numbers, 1 as int8, 2 as fp8 e4m3 in int8 (`kv_format.py`), the latter
two with a float32 scale a token and KV head. DOT is the type in which products are taken, always summed in float32.
"""

import triton
import triton.language as tl

from replicas.engine.triton.kernels.early import wait_for_others

# An e4m3 code's exponent is biased by 7. Its 7 low bits, moved up by 7, are the float16 of 1/256 of its value, and
# moved up by 4 the bfloat16 of 2^-120 of it, for subnormals too: no 8-bit float hardware is needed.
FP8_FACTOR = tl.constexpr(256.0)
_FROM_BF16 = tl.constexpr(2.0**112)  # to 1/256 of the value, as in float16


@triton.constexpr_function
def _spread_fp8(shift):
    """PTX: four e4m3 codes of a register -> four numbers of 16 bits, the 7 low bits moved up by 8 - shift."""
    kept = (0x7F00 >> shift) * 0x10001
    return (
        "{ .reg .b32 a, b, c, d; "
        + "".join(
            # A code in the upper byte of each half: its sign is in place.
            f"prmt.b32 {up}, $2, 0, {chosen}; shr.b32 {low}, {up}, {shift}; and.b32 {low}, {low}, {kept}; "
            f"lop3.b32 ${out}, {up}, 0x80008000, {low}, 0xEA; "
            for out, up, low, chosen in ((0, "a", "b", "0x1404"), (1, "c", "d", "0x3424"))
        )
        + "}"
    )


@triton.jit
def decode_codes(raw, CODE: tl.constexpr, DOT: tl.constexpr, ASM: tl.constexpr):
    """Stored numbers in DOT, still to be multiplied by their scale (and by FP8_FACTOR for CODE 2). ASM: four at a time
    where DOT has 16 bits; the interpreter computes the same one by one."""
    if CODE == 2:
        if ASM and DOT == tl.bfloat16:
            bits = tl.inline_asm_elementwise(_spread_fp8(4), "=&r,=&r,r", [raw], dtype=tl.int16, is_pure=True, pack=4)
            return bits.to(tl.bfloat16, bitcast=True) * tl.full([1, 1], _FROM_BF16, tl.float32).to(tl.bfloat16)
        elif ASM and DOT == tl.float16:
            bits = tl.inline_asm_elementwise(_spread_fp8(1), "=&r,=&r,r", [raw], dtype=tl.int16, is_pure=True, pack=4)
            return bits.to(tl.float16, bitcast=True)
        else:
            bits = raw.to(tl.int16)
            half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            return half.to(tl.float16, bitcast=True).to(DOT)
    else:
        return raw.to(DOT)


@triton.jit
def _walk(
    acc,
    peak,
    total,
    q,
    positions,
    begin,
    end,
    length,
    table,
    keys,
    values,
    key_scales,
    value_scales,
    key_block_stride,
    value_block_stride,
    token_stride,
    scale_block_stride,
    scale_token_stride,
    score_scale,
    window,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attend rows q [M, D] at `positions` to the keys at begin..end-1; pointers are those of the KV head."""
    dims = tl.arange(0, BLOCK_D)
    real = dims < HEAD_DIM
    if CODE == 2:
        score_scale *= FP8_FACTOR
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < length
        block = tl.load(table + cols // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offset = cols % BLOCK_SIZE
        key_rows = block * key_block_stride + offset * token_stride
        value_rows = block * value_block_stride + offset * token_stride
        k = tl.load(keys + key_rows[None, :] + dims[:, None], mask=inside[None, :] & real[:, None], other=0)
        scores = tl.dot(q, decode_codes(k, CODE, DOT, ASM), input_precision=PRECISION) * score_scale
        if CODE != 0:
            scale_rows = block * scale_block_stride + offset * scale_token_stride
            scores *= tl.load(key_scales + scale_rows, mask=inside, other=0.0)[None, :]
        if MASKED:
            visible = cols[None, :] <= positions[:, None]
            if WINDOWED:
                visible = visible & (cols[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps -inf; shifting by 0 then avoids inf - inf.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(peak - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None]
        v = tl.load(values + value_rows[:, None] + dims[None, :], mask=inside[:, None] & real[None, :], other=0)
        if CODE != 0:
            weights *= tl.load(value_scales + scale_rows, mask=inside, other=0.0)[None, :]
        acc = tl.dot(weights.to(DOT), decode_codes(v, CODE, DOT, ASM), acc, input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["num_seqs", "window", "table_stride"])
def prefill(
    q,
    out,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    query_start,
    context_lens,
    score_scale,
    window,
    num_seqs,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    table_stride,
    key_block_stride,
    value_block_stride,
    token_stride,
    head_stride,
    scale_block_stride,
    scale_token_stride,
    WINDOWED: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (at least the sum over sequences of ceil(tokens / QUERIES), KV heads): QUERIES tokens of one sequence each.

    Tile t of sequence s is program query_start[s] // QUERIES + s + t: at most one program a sequence is left over, and
    no table of tiles has to be made.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    low = tl.full([], 0, tl.int32)
    high = low + num_seqs - 1
    while low < high:  # the last sequence whose first tile is not after `tile`
        middle = (low + high + 1) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle - 1
    seq = low
    first_row = tl.load(query_start + seq)
    count = tl.load(query_start + seq + 1) - first_row
    first = (tile - (first_row // QUERIES + seq)) * QUERIES
    if first < count:
        length = tl.load(context_lens + seq)
        rows = tl.arange(0, BLOCK_M)
        token = first + rows // GROUP
        valid = (rows < QUERIES * GROUP) & (token < count)
        positions = tl.where(valid, length - count + token, -1)
        dims = tl.arange(0, BLOCK_D)
        head = kv_head * GROUP + rows % GROUP
        # Products of token and stride may pass 2^31 in a long batch.
        row = (first_row + token).to(tl.int64)
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        q_rows = row * q_token_stride + head * q_head_stride
        queries = tl.load(q + q_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(DOT)
        table = tables + seq.to(tl.int64) * table_stride
        keys += kv_head * head_stride
        values += kv_head * head_stride
        key_scales += kv_head
        value_scales += kv_head
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        position = length - count + first
        end = tl.minimum(position + QUERIES, length)
        begin = 0
        if WINDOWED:
            begin = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
        else:
            # All rows see all keys up to the first row's own position.
            begin = (position + 1) // BLOCK_N * BLOCK_N
            acc, peak, total = _walk(
                acc, peak, total, queries, positions, 0, begin, length, table,
                keys, values, key_scales, value_scales, key_block_stride, value_block_stride, token_stride,
                scale_block_stride, scale_token_stride, score_scale, window,
                False, WINDOWED, CODE, BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, PRECISION, ASM,
            )  # fmt: skip
        acc, peak, total = _walk(
            acc, peak, total, queries, positions, begin, end, length, table,
            keys, values, key_scales, value_scales, key_block_stride, value_block_stride, token_stride,
            scale_block_stride, scale_token_stride, score_scale, window,
            True, WINDOWED, CODE, BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, PRECISION, ASM,
        )  # fmt: skip
        if CODE == 2:
            acc *= FP8_FACTOR
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows = row * out_token_stride + head * HEAD_DIM
        tl.store(out + out_rows[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["window", "table_stride"])
def decode(
    q,
    out,
    parts,
    part_peaks,
    part_totals,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    query_start,
    context_lens,
    score_scale,
    window,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    table_stride,
    key_block_stride,
    value_block_stride,
    token_stride,
    head_stride,
    scale_block_stride,
    scale_token_stride,
    WHOLE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (sequences, KV heads, splits): at most QUERIES tokens a sequence, its context in even parts.

    The grid depends on nothing that changes from step to step; a part without keys only says so. WHOLE, for one part,
    writes `out`; else parts [T, heads, splits, D], part_peaks and part_totals [T, heads, splits] are left for `merge`.
    """
    wait_for_others(EARLY)
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first_row = tl.load(query_start + seq)
    count = tl.load(query_start + seq + 1) - first_row
    length = tl.load(context_lens + seq)
    rows = tl.arange(0, BLOCK_M)
    token = rows // GROUP
    valid = (token < count) & (rows < QUERIES * GROUP)
    positions = tl.where(valid, length - count + token, -1)
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + rows % GROUP
    row = (first_row + token).to(tl.int64)
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = row * q_token_stride + head * q_head_stride
    queries = tl.load(q + q_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(DOT)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(length - count - window + 1, 0) // BLOCK_N * BLOCK_N
    splits = tl.num_programs(2)
    share = tl.cdiv(tl.cdiv(length - lowest, BLOCK_N), splits) * BLOCK_N
    begin = lowest + split * share
    end = tl.minimum(begin + share, length)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, peak, total = _walk(
        acc, peak, total, queries, positions, begin, end, length, tables + seq.to(tl.int64) * table_stride,
        keys + kv_head * head_stride, values + kv_head * head_stride, key_scales + kv_head, value_scales + kv_head,
        key_block_stride, value_block_stride, token_stride, scale_block_stride, scale_token_stride, score_scale, window,
        True, WINDOWED, CODE, BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, PRECISION, ASM,
    )  # fmt: skip
    if CODE == 2:
        acc *= FP8_FACTOR
    if WHOLE:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows = row * out_token_stride + head * HEAD_DIM
        tl.store(out + out_rows[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=mask)
    else:
        part = (row * (tl.num_programs(1) * GROUP) + head) * splits + split
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(part_peaks + part, peak, mask=valid)
        tl.store(part_totals + part, total, mask=valid)


@triton.jit(do_not_specialize=["splits", "num_seqs"])
def merge(
    parts,
    part_peaks,
    part_totals,
    out,
    query_start,
    num_seqs,
    out_token_stride,
    splits,
    MOST_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (T, heads): the softmax-weighted mean of a row's parts, of which there are at most MOST_SPLITS.

    Rows behind the last sequence's, as padding has them, have no parts and become 0.
    """
    wait_for_others(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    each = tl.arange(0, MOST_SPLITS)
    there = (each < splits) & (row < tl.load(query_start + num_seqs))
    dims = tl.arange(0, BLOCK_D)
    real = dims < HEAD_DIM
    part = (row * tl.num_programs(1) + head) * splits + each
    peaks = tl.load(part_peaks + part, mask=there, other=float("-inf"))
    totals = tl.load(part_totals + part, mask=there, other=0.0)
    peak = tl.max(peaks, axis=0)
    factors = tl.exp2(peaks - tl.where(peak == float("-inf"), 0.0, peak))
    acc = tl.load(parts + part[:, None] * HEAD_DIM + dims[None, :], mask=there[:, None] & real[None, :], other=0.0)
    total = tl.sum(totals * factors, axis=0)
    result = tl.sum(acc * factors[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * out_token_stride + head * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=real)
