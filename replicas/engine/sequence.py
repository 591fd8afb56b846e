"""One choice of one request on its way through the engine. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from replicas.engine.phases import Phases
from replicas.engine.waiting import Account
from replicas.protocol import FinishReason, GenerateRequest, SamplingParams, block_hash


@dataclass(slots=True, eq=False)
class Sequence:
    """tokens: prompt then output. num_computed: how many of them have keys and values in `blocks`.

    hashes: of the full blocks of `tokens`, extended as they fill, the first after `root`.
    stored: how many of `blocks` were offered to the prefix cache.
    dirty_from: first index of `blocks` that the engine has not copied into its block table yet; row: its row there.
    account: what is charged for it, and whose turn it takes; all choices of a request have one.
    drafts: guesses at the tokens that follow, for the target to check in the next step; never more than a step old.
    pending: the last of `tokens` is still on the device, in this row of what the step in flight draws; -1: it is known.
    """

    request_id: str
    index: int
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    seed: int
    root: bytes
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    stored: int = 0
    dirty_from: int = 0
    row: int = -1
    admitted: bool = False
    num_cached: int = 0
    queued_tokens: int = 0
    account: Account = field(default_factory=Account)
    drafts: list[int] = field(default_factory=list)
    pending: int = -1
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host has."""
        return len(self.tokens) - (self.pending >= 0)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def ends_after(self, tokens: int, max_model_len: int) -> bool:
        """Whether so many more are its last, whatever they are."""
        return self.num_output + tokens >= self.sampling.max_tokens or self.num_tokens + tokens >= max_model_len

    def learn(self, token: int) -> None:
        """Its next token, or the one that was pending."""
        if self.pending >= 0:
            self.tokens[-1], self.pending = token, -1
        else:
            self.tokens.append(token)

    @property
    def guess(self) -> int | None:
        """What its next token is thought to be."""
        return self.drafts[0] if self.drafts else None

    @property
    def decodes(self) -> bool:
        """Whether it has output and lacks the keys and values of its last token only."""
        return 0 < self.num_output and self.num_computed + 1 == len(self.tokens)

    def logits_wanted(self, count: int) -> int:
        """Rows to sample from when `count` tokens are computed: after its last known token and after each draft."""
        return max(self.num_computed + count - len(self.tokens) + 1, 0)

    def extend_hashes(self, block_size: int) -> list[bytes]:
        """Hash the blocks that have become full; returns the whole chain."""
        hashes, tokens = self.hashes, self.tokens
        parent = hashes[-1] if hashes else self.root
        for start in range(len(hashes) * block_size, self.num_known - block_size + 1, block_size):
            parent = block_hash(parent, tokens[start : start + block_size])
            hashes.append(parent)
        return hashes

    def forget_blocks(self) -> list[int]:
        """Give up every block; the tokens will be computed again."""
        blocks, self.blocks, self.drafts = self.blocks, [], []
        self.num_computed = self.stored = self.dirty_from = 0
        return blocks


class AfterDrafts:
    """A sequence as it would be if its first `depth` drafts were tokens: what the row behind them is sampled for."""

    __slots__ = ("_depth", "_sequence")

    def __init__(self, sequence: Sequence, depth: int) -> None:
        self._sequence, self._depth = sequence, depth

    @property
    def sampling(self) -> SamplingParams:
        return self._sequence.sampling

    @property
    def seed(self) -> int:
        return self._sequence.seed

    @property
    def index(self) -> int:
        return self._sequence.index

    @property
    def num_output(self) -> int:
        return self._sequence.num_output + self._depth

    @property
    def tokens(self) -> list[int]:
        return self._sequence.tokens + self._sequence.drafts[: self._depth]

    @property
    def output(self) -> list[int]:
        return self._sequence.output + self._sequence.drafts[: self._depth]

    @property
    def guess(self) -> int | None:
        drafts = self._sequence.drafts
        return drafts[self._depth] if self._depth < len(drafts) else None


# Who a row of logits is for.
Row: TypeAlias = Sequence | AfterDrafts


def sampled_rows(sequence: Sequence, count: int) -> list[Row]:
    """Whom the logits that a step of `count` tokens brings are for, in their order."""
    wanted = sequence.logits_wanted(count)
    return [AfterDrafts(sequence, depth) if depth else sequence for depth in range(wanted)]


@dataclass(slots=True, eq=False)
class Group:
    """A request and its n sequences. `unforked` wait for the first one to compute their common prompt.

    phases: what its time went to.
    """

    request: GenerateRequest
    sequences: list[Sequence]
    unforked: list[Sequence]
    num_unfinished: int
    phases: Phases
