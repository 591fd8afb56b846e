"""Lays a scheduled step out as tensors. Owns the block table: one stable row per running sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.sequence import Sequence
from replicas.engine.staging import staged, staged_together

_FEW = 64  # tokens


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
        lens = [seq.num_computed + count for seq, count in items]
        counts = [count for _, count in items]
        ends = list(accumulate(counts))
        rows = [self._row(seq) for seq, _ in items]
        table = self.table[rows, : -(-(max(lens) + more_places) // self.block_size)]
        token_ids: list[int] = []
        for seq, count in items:
            known = seq.tokens[seq.num_computed : seq.num_computed + count]
            token_ids += known + seq.drafts[: count - len(known)] if len(known) < count else known
        places = self._few(items, ends) if ends[-1] <= _FEW else self._many(items, table, counts, ends)
        positions, slots, wanted = places
        staged_ids, staged_positions, staged_slots, query_start, context_lens, tables, logits_rows = staged_together(
            [
                (token_ids, torch.int64),
                (positions, torch.int64),
                (slots, torch.int64),
                ([0, *ends], torch.int32),
                (lens, torch.int32),
                (table, torch.int32),
                (wanted, torch.int64),
            ],
            self.device,
        )
        return StepBatch(
            token_ids=self._with_pending(staged_ids, items, lens, ends, drawn),
            positions=staged_positions,
            slot_mapping=staged_slots,
            query_start=query_start,
            context_lens=context_lens,
            block_tables=tables,
            logits_rows=logits_rows,
            max_query_len=max(counts),
            max_context_len=max(lens),
        )

    def _few(self, items: Seq[tuple[Sequence, int]], ends: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Positions, slots and rows that are sampled from. As `_many`, in the time that numpy takes to begin."""
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        size = self.block_size
        for (seq, count), end in zip(items, ends, strict=True):
            places = range(seq.num_computed, seq.num_computed + count)
            positions += places
            slots += [seq.blocks[place // size] * size + place % size for place in places]
            wanted += range(end - seq.logits_wanted(count), end)
        return positions, slots, wanted

    def _many(
        self, items: Seq[tuple[Sequence, int]], table: NDArray[np.int32], counts: list[int], ends: list[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        count, end, total = np.array(counts), np.array(ends), np.arange(ends[-1])
        computed = np.array([seq.num_computed for seq, _ in items])
        positions = total + np.repeat(computed - (end - count), count)
        owners = np.repeat(np.arange(len(items)), count)
        slots = table[owners, positions // self.block_size].astype(np.int64) * self.block_size
        wanted = np.array([seq.logits_wanted(count) for seq, count in items])
        first = np.repeat(end - wanted, count)
        return positions, slots + positions % self.block_size, np.flatnonzero(total >= first)

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
        lens: list[int],
        ends: list[int],
        drawn: Tensor | None,
    ) -> Tensor:
        if drawn is None:
            return token_ids
        places = [
            (end - 1, seq.pending)
            for (seq, _), length, end in zip(items, lens, ends, strict=True)
            if seq.pending >= 0 and length == seq.num_tokens
        ]
        if places:
            at, rows = staged(np.array(places).T, self.device, torch.int64).unbind()
            token_ids.index_copy_(0, at, drawn.index_select(0, rows))
        return token_ids
