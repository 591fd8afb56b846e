"""Guesses from a smaller model that runs ahead, on blocks of a KV pool of its own.

For every sequence that it guesses for it keeps a *shadow*: the tokens whose keys and values are in its pool. A shadow
follows the target: rejected guesses are cut off and overwritten, what the target wrote itself is computed when the next
guesses are wanted. A shadow that finds no room in the pool is simply not guessed for.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.blocks import BlockPool
from replicas.engine.graphs import Graph
from replicas.engine.layout import Layout
from replicas.engine.model import Decoder
from replicas.engine.sequence import Sequence
from replicas.engine.spec.further import Further, read
from replicas.engine.spec.proposer import Proposal, level


class Head(Protocol):
    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [R, H] -> the likeliest token of each, int64 [R], and its probability, float32 [R]."""
        ...


class Shadows:
    """The pool and who holds blocks of it; the half of a proposer that does not guess.

    decoder: the small model. kv_tokens: size of its pool. max_sequences: shadows at most. budget: tokens of one of its
    steps.
    """

    name, costs = "draft_model", True

    def __init__(self, decoder: Decoder, *, kv_tokens: int, block_size: int, max_sequences: int, budget: int) -> None:
        self._decoder, self._budget = decoder, budget
        blocks = max(kv_tokens // block_size, 1)
        self.pool = BlockPool(blocks, block_size, enable_prefix_caching=False)
        self._layout = Layout(max_sequences, decoder.max_model_len, block_size, decoder.device)
        self._caches = decoder.plain_cache(blocks + 1, block_size).layers  # the last is scratch for padded steps
        self._shadows: dict[Sequence, Sequence] = {}

    def _shadow(self, seq: Sequence) -> Sequence | None:
        """The one there is, or a new one without tokens if there is a place for it; `_grow` keeps it."""
        shadow = self._shadows.get(seq)
        if shadow is None and len(self._shadows) < len(self._layout.table):
            shadow = Sequence(seq.request_id, seq.index, [], 0, seq.sampling, 0, b"")
        return shadow

    def _grow(self, seq: Sequence, shadow: Sequence, length: int) -> bool:
        """Blocks for `length` tokens; without room for them the shadow is forgotten."""
        missing = -(-length // self.pool.block_size) - len(shadow.blocks)
        if length > self._decoder.max_model_len or missing > self.pool.num_free:
            self.forget(seq)
            return False
        if missing > 0:
            shadow.blocks += self.pool.allocate(missing)
        self._shadows[seq] = shadow
        return True

    def forget(self, seq: Sequence) -> None:
        shadow = self._shadows.pop(seq, None)
        if shadow is not None:
            self._layout.release(shadow)
            self.pool.release(shadow.forget_blocks())

    def check_integrity(self, running: Seq[Sequence]) -> None:
        assert set(self._shadows) <= set(running), "a shadow outlived its sequence"
        self.pool.check_integrity([shadow.blocks for shadow in self._shadows.values()])
        rows = sum(shadow.row >= 0 for shadow in self._shadows.values())
        assert self._layout.rows_in_use == rows, f"{self._layout.rows_in_use} draft rows in use, {rows} held"


class DraftModel(Shadows):
    """A model of its own, or layers of the target: reads tokens and nothing else, a long prompt in pieces.

    head: from its hidden states to tokens. make_graph: see `Further`.
    """

    def __init__(
        self, decoder: Decoder, head: Head, make_graph: Callable[[], Graph] | None = None, **settings: int
    ) -> None:
        super().__init__(decoder, **settings)
        self._head = head
        self._further = Further(
            self._guess,
            make_graph,
            max_seqs=settings["max_sequences"],
            max_blocks=self._layout.table.shape[1],
            block_size=self.pool.block_size,
            scratch=self.pool.num_blocks,
        )

    @property
    def replays(self) -> int:
        """Guesses that were replayed from a recording."""
        return self._further.replays

    def _guess(self, batch: StepBatch, states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self._decoder.hidden(batch, self._caches)
        return *self._head.likeliest(hidden), hidden

    @torch.inference_mode()
    def propose(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        shadows = {seq: shadow for seq in sequences if (shadow := self._follow(seq, depth)) is not None}
        if not shadows or not depth:
            return [Proposal() for _ in sequences]
        guesses, sure = read(*self._chain(list(shadows.values()), depth))
        found: dict[Sequence, Proposal] = {}
        for i, (seq, shadow) in enumerate(shadows.items()):
            tokens = [row[i] for row in guesses]
            shadow.tokens += tokens
            shadow.num_computed = len(shadow.tokens) - 1
            found[seq] = Proposal(tokens, [level(row[i]) for row in sure])
        return [found.get(seq, Proposal()) for seq in sequences]

    def _chain(self, shadows: list[Sequence], depth: int) -> tuple[list[Tensor], list[Tensor]]:
        tokens, sure = self._head.likeliest(self._last_states(shadows))
        if depth == 1:
            return [tokens], [sure]
        # Laid out as if the newest tokens stood there already: only their ids are missing, and those are on the device.
        batch = self._layout([(shadow, 0) for shadow in shadows], more_places=depth - 1)
        more, surer = self._further(tokens, None, batch.block_tables, batch.context_lens, depth - 1)
        return [tokens, *more], [sure, *surer]

    def _follow(self, seq: Sequence, depth: int) -> Sequence | None:
        """The shadow of `seq` with exactly its tokens and blocks for `depth` more; None if there is no room."""
        shadow = self._shadow(seq)
        if shadow is None:
            return None
        agree = min(len(shadow.tokens), len(seq.tokens))
        while agree > seq.num_prompt and shadow.tokens[agree - 1] != seq.tokens[agree - 1]:
            agree -= 1  # guesses stand at the end, so this looks at a few tokens only
        shadow.tokens[agree:] = seq.tokens[agree:]
        shadow.num_computed = min(shadow.num_computed, agree, len(seq.tokens) - 1)
        return shadow if self._grow(seq, shadow, len(seq.tokens) + depth) else None

    def _last_states(self, shadows: list[Sequence]) -> Tensor:
        """Compute all that shadows lack, in steps of `budget` tokens: hidden states [S, H] of their last tokens."""
        states: dict[Sequence, Tensor] = {}
        while lacking := [s for s in shadows if s.num_computed < s.num_tokens]:
            items, left = [], self._budget
            for shadow in lacking:
                count = min(shadow.num_tokens - shadow.num_computed, left)
                if count:
                    items.append((shadow, count))
                    left -= count
            batch: StepBatch = self._layout(items)
            rows = iter(self._decoder.hidden(batch, self._caches))
            for shadow, count in items:
                shadow.num_computed += count
                if shadow.num_computed == shadow.num_tokens:
                    states[shadow] = next(rows)
        return torch.stack([states[shadow] for shadow in shadows])

    def observe(self, seq: Sequence, states: Tensor) -> None:
        pass
