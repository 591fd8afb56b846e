"""Guesses from text that is there already: prompt lookup (Saxena 2023; vLLM's "ngram") and suffix lookup over earlier
requests of the same tenant (after SuffixDecoding, Oliaro et al. 2024, arXiv:2411.04975). No model runs.

Both search for the longest earlier occurrence of what the sequence ends with and propose what followed it there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq

from torch import Tensor

from replicas.engine.sequence import Sequence
from replicas.engine.spec.proposer import Proposal, level

_CANDIDATES = 12  # earlier occurrences that are compared, newest first
_LONGEST = 16  # tokens of agreement beyond which longer is no better
_END = -1  # between two texts: no token, so nothing matches across it


class Index:
    """Texts end to end; finds the longest suffix of a context in them through chains of equal `min_match`-grams (LZ77).

    About 30 bytes a token, the positions of a gram once each.
    """

    def __init__(self, min_match: int) -> None:
        self._n = min_match
        self._tokens = array("i")
        self._newest: dict[tuple[int, ...], int] = {}  # gram -> where it last ended (exclusive)
        self._older = array("i")  # by end position: where the same gram ended before, or 0

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Seq[int]) -> None:
        n, held = self._n, self._tokens
        if not held:
            self._older.append(0)
        for token in tokens:
            held.append(token)
            end = len(held)
            gram = tuple(held[end - n :]) if end >= n else ()
            if len(gram) == n and _END not in gram:
                self._older.append(self._newest.get(gram, 0))
                self._newest[gram] = end
            else:
                self._older.append(0)

    def end_text(self) -> None:
        self.extend((_END,))

    def find(self, context: Seq[int], most: int, *, itself: bool) -> tuple[int, list[int]]:
        """(tokens that agree, what followed them there, at most `most`); (0, []) if fewer than min_match agree.

        itself: the context is the text held here, whose own end is no occurrence.
        """
        n, held = self._n, self._tokens
        if len(context) < n:
            return 0, []
        at = self._newest.get(tuple(context[-n:]), 0)
        if itself and at == len(held):
            at = self._older[at]
        best, where = 0, 0
        tail = context[-_LONGEST:]
        for _ in range(_CANDIDATES):
            if not at:
                break
            agree = n
            while agree < len(tail) and agree < at and held[at - 1 - agree] == tail[-1 - agree]:
                agree += 1
            if agree > best and at < len(held) and held[at] != _END:
                best, where = agree, at
                if best == _LONGEST:
                    break
            at = self._older[at]
        return best, self._what_follows(where, most) if best else []

    def _what_follows(self, where: int, most: int) -> list[int]:
        """Tokens from `where`; a text that ends too soon is read as repeating from there on."""
        follows = self._tokens[where : where + most].tolist()
        if _END in follows:
            return follows[: follows.index(_END)]
        while len(follows) < most:
            follows += follows[: most - len(follows)]
        return follows


# Agreement so long was right about so often; only the order matters, the rest is measured.
_SURE = (0.0, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.75, 0.85, 0.85, 0.85, 0.85, 0.95)


def _proposal(agree: int, follows: list[int]) -> Proposal:
    return Proposal(follows, [level(_SURE[min(agree + i, len(_SURE) - 1)]) for i in range(len(follows))])


class Ngram:
    """What followed the same tokens earlier in the sequence itself, prompt included."""

    name, costs = "ngram", False

    def __init__(self, min_match: int) -> None:
        self._min_match = min_match
        self._indices: dict[Sequence, Index] = {}

    def propose(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        return [_proposal(*self.find(seq, depth)) for seq in sequences]

    def find(self, seq: Sequence, most: int) -> tuple[int, list[int]]:
        index = self._indices.get(seq)
        if index is None:
            index = self._indices[seq] = Index(self._min_match)
        index.extend(seq.tokens[len(index) :])
        return index.find(seq.tokens, most, itself=True)

    def observe(self, seq: Sequence, states: Tensor) -> None:
        pass

    def forget(self, seq: Sequence) -> None:
        self._indices.pop(seq, None)

    def check_integrity(self, running: Seq[Sequence]) -> None:
        assert set(self._indices) <= set(running), "an index outlived its sequence"


class _Earlier:
    """One tenant's earlier texts, the newest `most` tokens of them."""

    def __init__(self, min_match: int) -> None:
        self._min_match = min_match
        self.index = Index(min_match)
        self._texts: deque[list[int]] = deque()

    def add(self, text: list[int], most: int) -> None:
        self._texts.append(text[:most])
        self.index.extend(text[:most])
        self.index.end_text()
        if len(self.index) > most:  # rebuilt from the newer half: now and then, and never held twice for long
            kept, size = deque[list[int]](), 0
            while self._texts and size + len(self._texts[-1]) <= most // 2:
                kept.appendleft(self._texts.pop())
                size += len(kept[0]) + 1
            self._texts, self.index = kept, Index(self._min_match)
            for text in kept:
                self.index.extend(text)
                self.index.end_text()


class Suffix:
    """As Ngram, and what followed the same tokens in finished requests of the same tenant, whichever agrees longer.

    A tenant is known by the root of its prefix hashes, so what is never shared in the KV cache is never shared here.
    most: tokens kept, of all tenants together; the tenant that was longest without a request goes first.
    """

    name, costs = "suffix", False

    def __init__(self, min_match: int, most: int) -> None:
        self._own = Ngram(min_match)
        self._min_match, self._most = min_match, most
        self._earlier: OrderedDict[bytes, _Earlier] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return sum(len(earlier.index) for earlier in self._earlier.values())

    def propose(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        return [self._longest(seq, depth) for seq in sequences]

    def _longest(self, seq: Sequence, depth: int) -> Proposal:
        own = self._own.find(seq, depth)
        earlier = self._earlier.get(seq.root)
        if earlier is None:
            return _proposal(*own)
        found = earlier.index.find(seq.tokens, depth, itself=False)
        return _proposal(*(found if found[0] > own[0] else own))

    def observe(self, seq: Sequence, states: Tensor) -> None:
        pass

    def forget(self, seq: Sequence) -> None:
        self._own.forget(seq)
        if seq.finish_reason is None:
            return
        earlier = self._earlier.pop(seq.root, None) or _Earlier(self._min_match)
        earlier.add(seq.tokens, self._most)
        self._earlier[seq.root] = earlier
        while self.num_tokens > self._most and len(self._earlier) > 1:
            self._earlier.popitem(last=False)

    def check_integrity(self, running: Seq[Sequence]) -> None:
        self._own.check_integrity(running)
        assert self.num_tokens <= self._most + 1, f"{self.num_tokens} tokens kept, {self._most} allowed"
