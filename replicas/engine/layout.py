"""Lays a scheduled step out as tensors. Owns the block table: one stable row per running sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.sequence import Sequence
from replicas.engine.staging import staged


class Layout:
    """table: int32 [max_num_seqs, blocks of max_model_len]; only what changed since the last step is written to it."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def release(self, seq: Sequence) -> None:
        """Call when a sequence leaves the running set, for whatever reason."""
        if seq.row >= 0:
            self._free_rows.append(seq.row)
            seq.row, seq.dirty_from = -1, 0

    @property
    def rows_in_use(self) -> int:
        return len(self.table) - len(self._free_rows)

    def __call__(
        self, items: Seq[tuple[Sequence, int]], drawn: Tensor | None = None, more_places: int = 0
    ) -> StepBatch:
        """items: (sequence, number of its tokens and drafts to compute), block lists already long enough.

        drawn: int64 [R], where the device holds the tokens that are `pending`. more_places: behind the last one of each
        sequence whose blocks shall stand in the tables too.
        """
        counts = np.fromiter((count for _, count in items), dtype=np.int64, count=len(items))
        computed = np.fromiter((seq.num_computed for seq, _ in items), dtype=np.int64, count=len(items))
        rows = np.fromiter((self._row(seq) for seq, _ in items), dtype=np.int64, count=len(items))
        lens = computed + counts
        ends = counts.cumsum()
        token_ids: list[int] = []
        for seq, count in items:
            known = seq.tokens[seq.num_computed : seq.num_computed + count]
            token_ids += known + seq.drafts[: count - len(known)] if len(known) < count else known
        total = int(ends[-1])
        positions = np.arange(total) + np.repeat(computed - (ends - counts), counts)
        table = self.table[rows, : -(-(int(lens.max()) + more_places) // self.block_size)]
        owners = np.repeat(np.arange(len(items)), counts)
        slots = table[owners, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        wanted = np.fromiter((seq.logits_wanted(n) for seq, n in items), dtype=np.int64, count=len(items))
        return StepBatch(
            token_ids=self._with_pending(self._staged(np.array(token_ids, dtype=np.int64)), items, lens, ends, drawn),
            positions=self._staged(positions),
            slot_mapping=self._staged(slots),
            query_start=self._staged(np.concatenate(([0], ends)).astype(np.int32)),
            context_lens=self._staged(lens.astype(np.int32)),
            block_tables=self._staged(table),
            logits_rows=self._staged(np.flatnonzero(np.arange(total) >= np.repeat(ends - wanted, counts))),
            max_query_len=int(counts.max()),
            max_context_len=int(lens.max()),
        )

    def _row(self, seq: Sequence) -> int:
        if seq.row < 0:
            seq.row, seq.dirty_from = self._free_rows.pop(), 0
        if seq.dirty_from < len(seq.blocks):
            self.table[seq.row, seq.dirty_from : len(seq.blocks)] = seq.blocks[seq.dirty_from :]
            seq.dirty_from = len(seq.blocks)
        return seq.row

    def _with_pending(
        self,
        token_ids: Tensor,
        items: Seq[tuple[Sequence, int]],
        lens: NDArray[np.int64],
        ends: NDArray[np.int64],
        drawn: Tensor | None,
    ) -> Tensor:
        if drawn is None:
            return token_ids
        places = [
            (int(end) - 1, seq.pending)
            for (seq, _), length, end in zip(items, lens, ends, strict=True)
            if seq.pending >= 0 and length == seq.num_tokens
        ]
        if places:
            at, rows = self._staged(np.array(places, dtype=np.int64).T).unbind()
            token_ids.index_copy_(0, at, drawn.index_select(0, rows))
        return token_ids

    def _staged(self, values: NDArray[Any]) -> Tensor:
        return staged(values, self.device)
