"""The engine's side of speculation: asks proposers before a step, learns from what the step made of their guesses."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.sequence import AfterDrafts, Sequence
from replicas.engine.spec.acceptance import Acceptance
from replicas.engine.spec.cost import AskingCost, StepCost
from replicas.engine.spec.lengths import can_pay, choose_depth, choose_lengths
from replicas.engine.spec.proposer import Proposal, Proposer

logger = logging.getLogger(__name__)

_TRUST_MEMORY = 0.99  # per proposal
_TRUST_PRIOR = 5.0  # tokens


class _Source:
    """One proposer and what is known of it."""

    def __init__(self, proposer: Proposer, depth: int) -> None:
        self.proposer = proposer
        self.acceptance = Acceptance(depth)
        self.cost = AskingCost()

    def ask(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        began = time.perf_counter()
        proposals = self.proposer.propose(sequences, depth)
        if self.proposer.costs:
            self.cost.record(time.perf_counter() - began, depth)
        return proposals


class Speculation:
    """proposers: none switches speculation off. max_draft_tokens, adaptive: see `Speculative`.

    Counters only grow: num_drafts (proposals that were checked), num_draft_tokens, accepted_per_position.
    """

    def __init__(self, proposers: Seq[Proposer], max_draft_tokens: int, *, adaptive: bool = True) -> None:
        self._sources = [_Source(proposer, max_draft_tokens) for proposer in proposers]
        self._most, self._adaptive = max_draft_tokens, adaptive
        self.cost = StepCost()
        self.proposing_s = 0.0
        self.num_drafts = self.num_draft_tokens = 0
        self.accepted_per_position = [0] * (max_draft_tokens if proposers else 0)
        self._chosen: dict[Sequence, tuple[_Source, Seq[int], float]] = {}
        self._claimed = self._kept = _TRUST_PRIOR  # tokens that the chosen guesses promised and brought, lately
        self._first_row: dict[Sequence, int] = {}
        self._hidden: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether anybody guesses."""
        return bool(self._sources)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.accepted_per_position)

    # ---------------------------------------------------------------- before a step

    def propose(self, running: Seq[Sequence], rows: int) -> None:
        """Give sequences drafts for the coming step, which has about `rows` tokens without them."""
        self._chosen.clear()
        for seq in running:
            seq.drafts = []
        if not self._sources:
            return
        began = time.perf_counter()
        self._propose([seq for seq in running if seq.decodes and _room(seq) > 0], rows)
        self.proposing_s = time.perf_counter() - began

    def _propose(self, sequences: list[Sequence], rows: int) -> None:
        if not sequences:
            return
        cost = self.cost.relative(rows, len(sequences) * self._most)
        if self._adaptive and not can_pay(len(sequences), cost):
            for seq in sequences:
                self._idle(seq)
            return
        best = {seq: (0.0, self._sources[0], Proposal()) for seq in sequences}
        for source in sorted(self._sources, key=lambda source: source.proposer.costs):
            self._ask(source, best, cost)
        self._cut(best, cost)

    def _ask(
        self, source: _Source, best: dict[Sequence, tuple[float, _Source, Proposal]], cost: NDArray[np.float64]
    ) -> None:
        sequences, depth = list(best), self._most
        if source.proposer.costs and self._adaptive:
            sequences, depth = self._worth_asking(source, best, cost)
        if not depth or not sequences:
            return
        try:
            proposals = source.ask(sequences, depth)
        except Exception:
            # Requests do not need guesses: go on without the proposer rather than lose what it guesses for.
            logger.exception("proposer %s failed: this engine goes on without it", source.proposer.name)
            for seq in best:
                source.proposer.forget(seq)
            self._sources.remove(source)
            return
        for seq, proposal in zip(sequences, proposals, strict=True):
            most = min(_room(seq), self._most)
            proposal = Proposal(proposal.tokens[:most], proposal.levels[:most])
            gain = _gain(source.acceptance.probabilities(seq, proposal.levels))
            if proposal.tokens and (gain > best[seq][0] or not best[seq][2].tokens):
                best[seq] = gain, source, proposal

    def _worth_asking(
        self, source: _Source, best: dict[Sequence, tuple[float, _Source, Proposal]], cost: NDArray[np.float64]
    ) -> tuple[list[Sequence], int]:
        """The sequences for which it usually knows better than what is there, and how far ahead to ask."""
        usual = {seq: source.acceptance.usual(seq) for seq in best}
        sequences = [seq for seq, worth in usual.items() if _gain(worth) > best[seq][0]]
        asking = source.cost.seconds(self._most) / (self.cost.scale or 1.0)
        return sequences, choose_depth([usual[seq] for seq in sequences], len(best) - len(sequences), cost, asking)

    def _cut(self, best: dict[Sequence, tuple[float, _Source, Proposal]], cost: NDArray[np.float64]) -> None:
        """Of each proposal the part that pays."""
        proposals = list(best.values())
        if not any(proposal.tokens for _, _, proposal in proposals):
            for seq in best:
                self._idle(seq)
            return
        lengths = [len(proposal.tokens) for _, _, proposal in proposals]
        chances = [source.acceptance.probabilities(seq, proposal.levels) for seq, (_, source, proposal) in best.items()]
        if self._adaptive:
            lengths = choose_lengths(chances, cost, self._trust)
        for seq, length, (_, source, proposal), chance in zip(best, lengths, proposals, chances, strict=True):
            seq.drafts = list(proposal.tokens[:length])
            if length:
                self._chosen[seq] = source, proposal.levels[:length], _gain(chance[:length])
            else:
                self._idle(seq)

    @property
    def _trust(self) -> float:
        """What the guesses that are chosen bring, as a share of what was expected of them.

        Where only the surest of many pay, those are chosen that are overrated most, and each level's record, which
        counts all of them, does not show it.
        """
        return min(self._kept / self._claimed, 1.0)

    def _idle(self, seq: Sequence) -> None:
        for source in self._sources:
            source.acceptance.idle(seq)

    # ---------------------------------------------------------------- after it

    def computed(self, rows: Seq[Sequence | AfterDrafts], hidden: Tensor) -> None:
        """hidden [R, H]: the target's last normed states of the sampled rows."""
        if self._sources:
            self._hidden = hidden.clone()  # the next step may compute into the same memory
            self._first_row = {row: at for at, row in enumerate(rows) if isinstance(row, Sequence)}

    def verified(self, seq: Sequence, drafts: int, accepted: int) -> None:
        """`seq` got its new tokens: the first `accepted` of its `drafts`, and one of the target's own."""
        if not self._sources:
            return
        chosen = self._chosen.pop(seq, None)
        if drafts and chosen is not None:
            source, levels, claimed = chosen
            source.acceptance.record(seq, levels[:drafts], accepted)
            self._claimed = _TRUST_PRIOR + _TRUST_MEMORY * (self._claimed - _TRUST_PRIOR) + claimed
            self._kept = _TRUST_PRIOR + _TRUST_MEMORY * (self._kept - _TRUST_PRIOR) + accepted
            self.num_drafts += 1
            self.num_draft_tokens += drafts
            for position in range(accepted):
                self.accepted_per_position[position] += 1
        if seq.finish_reason is None and self._hidden is not None:
            first = self._first_row[seq]
            states = self._hidden[first : first + accepted + 1]
            for source in self._sources:
                source.proposer.observe(seq, states)

    def record(self, seconds: float, rows: int) -> None:
        """A step of `rows` tokens, drafts included, took `seconds`, proposing included."""
        if self._sources:
            self._hidden = None
            self.cost.record(max(seconds - self.proposing_s, 1e-9), rows)

    def forget(self, seq: Sequence) -> None:
        """`seq` left the running set, for whatever reason."""
        self._chosen.pop(seq, None)
        for source in self._sources:
            source.acceptance.forget(seq)
            source.proposer.forget(seq)

    def check_integrity(self, running: Seq[Sequence]) -> None:
        """AssertionError if anything is kept for sequences that do not run."""
        for source in self._sources:
            source.proposer.check_integrity(running)


def _room(seq: Sequence) -> int:
    """Drafts that could be accepted: the step brings one token more than them."""
    return seq.sampling.max_tokens - seq.num_output - 1


def _gain(probabilities: Seq[float]) -> float:
    """Expected number of accepted guesses."""
    total, chance = 0.0, 1.0
    for probability in probabilities:
        chance *= probability
        total += chance
    return total
