"""Guess upon guess: each from the one before it, on the device from the first to the last.

The host neither lays these steps out nor waits for them. Where steps are recorded (`graphs.py`), a guess for so many
sequences is one graph: on a GPU the few kernels of a draft take less time than launching them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.graphs import Graph, Recording, bucket_sizes

# (a step of one token a sequence, states [S, H] or None) -> tokens int64 [S], probabilities float32 [S], states [S, H]
Guess = Callable[[StepBatch, Tensor | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Places:
    """Where S sequences are: token_ids int64 [S], the newest of each, not computed yet; lens int32 [S], tokens before
    it; tables int32 [S, B]; states [S, H], where guesses are made from them; sure float32 [S]: of the newest."""

    token_ids: Tensor
    lens: Tensor
    tables: Tensor
    states: Tensor | None
    sure: Tensor

    def copy(self) -> Places:
        """One whose numbers may be changed; tables never are."""
        states = None if self.states is None else self.states.clone()
        return Places(self.token_ids.clone(), self.lens.clone(), self.tables, states, self.sure.clone())

    def batch(self, block_size: int) -> StepBatch:
        """The step that computes the newest tokens."""
        at = self.lens.long()
        blocks = self.tables.gather(1, (at // block_size)[:, None])[:, 0].long()
        count = torch.arange(len(at) + 1, device=at.device)
        return StepBatch(
            token_ids=self.token_ids,
            positions=at,
            slot_mapping=blocks * block_size + at % block_size,
            query_start=count.int(),
            context_lens=self.lens + 1,
            block_tables=self.tables,
            logits_rows=count[:-1],
            max_query_len=1,
            max_context_len=self.tables.shape[1] * block_size,
        )


@dataclass(slots=True)
class _Bucket:
    places: Places
    recording: Recording = field(default_factory=Recording)


class Further:
    """make_graph: a fresh Graph; None launches every step as it is. scratch: a block that no sequence ever gets.

    max_seqs, max_blocks: the most there can be; larger steps run as they are.
    """

    def __init__(
        self,
        guess: Guess,
        make_graph: Callable[[], Graph] | None,
        *,
        max_seqs: int,
        max_blocks: int,
        block_size: int,
        scratch: int,
    ) -> None:
        self._guess, self._make_graph = guess, make_graph
        self._sizes, self._max_blocks = bucket_sizes(max_seqs), max_blocks
        self._block_size, self._scratch = block_size, scratch
        self._buckets: dict[int, _Bucket] = {}
        self.replays = 0

    def __call__(
        self, tokens: Tensor, states: Tensor | None, tables: Tensor, lens: Tensor, depth: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`depth` more guesses after `tokens`, and how probable each is: [depth] of [S]. See Places."""
        count = len(tokens)
        given = Places(tokens, lens, tables, states, torch.empty(count, device=tokens.device))
        bucket = self._bucket(given)
        graph = None if bucket is None else self._graph(bucket, given)
        if bucket is None or graph is None:
            places = given.copy()
        else:
            places = bucket.places
            self._fill(places, given)
            self.replays += depth
        found, sure = [], []
        for _ in range(depth):
            if graph is None:
                self._advance(places)
            else:
                graph.replay()
            found.append(places.token_ids[:count].clone())
            sure.append(places.sure[:count].clone())
        return found, sure

    def _bucket(self, given: Places) -> _Bucket | None:
        count, blocks = given.tables.shape
        if self._make_graph is None or count > self._sizes[-1] or blocks > self._max_blocks:
            return None
        size = self._sizes[bisect_left(self._sizes, count)]
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = self._buckets[size] = _Bucket(self._fixed(size, given))
        return bucket

    def _fixed(self, size: int, like: Places) -> Places:
        device, states = like.token_ids.device, like.states
        return Places(
            torch.zeros(size, dtype=torch.int64, device=device),
            torch.zeros(size, dtype=torch.int32, device=device),
            torch.full((size, self._max_blocks), self._scratch, dtype=torch.int32, device=device),
            None if states is None else states.new_zeros(size, states.shape[1]),
            torch.zeros(size, device=device),
        )

    def _fill(self, places: Places, given: Places) -> None:
        """Padding stands at the beginning of the scratch block, and is never as long as a table."""
        count, blocks = given.tables.shape
        places.token_ids[:count].copy_(given.token_ids)
        places.token_ids[count:] = 0
        places.lens[:count].copy_(given.lens)
        places.lens[count:] = 0
        places.tables[:count, :blocks].copy_(given.tables)
        places.tables[count:] = self._scratch
        if places.states is not None and given.states is not None:
            places.states[:count].copy_(given.states)

    def _advance(self, places: Places) -> None:
        tokens, sure, states = self._guess(places.batch(self._block_size), places.states)
        places.token_ids.copy_(tokens)
        places.sure.copy_(sure)
        places.lens.add_(1)
        if places.states is not None:
            places.states.copy_(states)

    def _graph(self, bucket: _Bucket, given: Places) -> Graph | None:
        assert self._make_graph is not None, "a bucket without anything to record it with"
        return bucket.recording.next(
            self._make_graph,
            lambda: self._fill(bucket.places, given),
            lambda: self._advance(bucket.places),  # what it writes is written again
            f"guesses for {len(given.token_ids)} sequences",
        )


def read(tokens: list[Tensor], sure: list[Tensor]) -> tuple[list[list[int]], list[list[float]]]:
    """Guesses and how probable they are, on the host: waited for once."""
    return torch.stack(tokens).tolist(), torch.stack(sure).tolist()
