"""Queries in 8 bits, for attention that multiplies them with 8-bit keys."""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import choose_kv_format

_FORMAT = choose_kv_format("fp8_e4m3_head", torch.bfloat16)


def round_queries(q: Tensor, batch: StepBatch, kv_heads: int) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] in e4m3, and the factors float32 [S, Hk] that give it back, one a sequence and KV head.

    A factor is the largest magnitude among the sequence's tokens and the KV head's query heads / 448 (1 for a sequence
    without tokens): what stands beside a sequence changes nothing of it. Shapes follow from those of q and the batch,
    and the host waits for nothing, so the operations can be recorded. Rows that no sequence owns, as padding has them,
    have a factor of their own.
    """
    grouped = q.view(len(q), kv_heads, -1, q.shape[2])
    largest = grouped.abs().amax(dim=(2, 3)).float()
    rows = torch.arange(len(q), device=q.device, dtype=torch.int32)
    owner = torch.searchsorted(batch.query_start[1:].contiguous(), rows, right=True)
    most = torch.zeros(len(batch.context_lens) + 1, kv_heads, device=q.device)
    most.scatter_reduce_(0, owner.unsqueeze(1).expand(-1, kv_heads), largest, "amax")
    scales = _FORMAT.scales_for(most)
    codes, _ = _FORMAT.encode(grouped.flatten(2), scales[owner])
    return codes.view(torch.float8_e4m3fn).view(q.shape), scales[:-1]
