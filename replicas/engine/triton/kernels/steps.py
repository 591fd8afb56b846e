"""A step padded to a bucket, in one kernel. See `graphs.pad_into` for what goes where."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "num_seqs", "blocks", "table_stride"])
def pad_step(
    token_ids,
    positions,
    slots,
    query_start,
    lens,
    tables,
    to_token_ids,
    to_positions,
    to_slots,
    to_query_start,
    to_lens,
    to_tables,
    tokens,
    num_seqs,
    blocks,
    table_stride,
    to_table_stride,
    scratch_slot,
    scratch_block,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (sequences of the bucket,): program i writes sequence i and tokens i * WIDTH .. i * WIDTH + WIDTH - 1."""
    seq = tl.program_id(0)
    most = tl.num_programs(0) * WIDTH
    width = tl.arange(0, BLOCK_W)
    at = seq * WIDTH + width
    inside = width < WIDTH
    real = inside & (at < tokens)
    tl.store(to_token_ids + at, tl.load(token_ids + at, mask=real, other=0), mask=inside)
    tl.store(to_positions + at, tl.load(positions + at, mask=real, other=0), mask=inside)
    slot = tl.load(slots + at, mask=real, other=0)
    tl.store(to_slots + at, tl.where(real, slot, scratch_slot), mask=inside)
    if seq < num_seqs:
        tl.store(to_query_start + seq + 1, tl.load(query_start + seq + 1))
        tl.store(to_lens + seq, tl.load(lens + seq))
        for first in range(0, blocks, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            found = tl.load(tables + seq.to(tl.int64) * table_stride + cols, mask=cols < blocks, other=0)
            tl.store(to_tables + seq.to(tl.int64) * to_table_stride + cols, found, mask=cols < blocks)
    else:
        end = tl.minimum(tokens + (seq - num_seqs + 1) * WIDTH, most)
        tl.store(to_query_start + seq + 1, end)
        tl.store(to_lens + seq, end - tl.minimum(tokens + (seq - num_seqs) * WIDTH, most))
        tl.store(to_tables + seq.to(tl.int64) * to_table_stride, scratch_block)
    if seq == 0:
        tl.store(to_query_start, 0)
