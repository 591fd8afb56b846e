"""The tensors of one step: every sequence's new tokens laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """S sequences bring T new tokens in all; a decode brings 1, a prefill chunk more: nothing else tells them apart.

    token_ids, positions: int64 [T].
    slot_mapping: int64 [T], where each token's key and value go: block id * block_size + offset.
    query_start: int32 [S + 1], sequence i owns rows query_start[i]:query_start[i+1].
    context_lens: int32 [S], tokens in the KV cache once this step's are written (so the last query of sequence i has
        position context_lens[i] - 1).
    block_tables: int32 [S, B], rows padded with 0 past a sequence's last block.
    logits_rows: int64 [R], the rows of the T for which logits are wanted.
    max_query_len, max_context_len: Python ints, so that no backend has to synchronise with a device to know them.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logits_rows: Tensor
    max_query_len: int
    max_context_len: int
