"""`graphs.pad_into` in one launch instead of a dozen."""

from __future__ import annotations

from replicas.engine.batch import StepBatch
from replicas.engine.triton.device import next_power_of_2


def pad_into(fixed: StepBatch, batch: StepBatch, scratch_block: int, block_size: int) -> None:
    """See `replicas.engine.graphs.pad_into`."""
    from replicas.engine.triton.kernels.steps import pad_step

    width = fixed.max_query_len
    pad_step[(len(fixed.context_lens),)](
        *(batch.token_ids, batch.positions, batch.slot_mapping),
        *(batch.query_start, batch.context_lens, batch.block_tables),
        *(fixed.token_ids, fixed.positions, fixed.slot_mapping),
        *(fixed.query_start, fixed.context_lens, fixed.block_tables),
        *(len(batch.token_ids), len(batch.context_lens), batch.block_tables.shape[1]),
        *(batch.block_tables.stride(0), fixed.block_tables.stride(0)),
        *(scratch_block * block_size, scratch_block),
        WIDTH=width,
        BLOCK_W=next_power_of_2(width),
        BLOCK=128,
        num_warps=1,
    )
