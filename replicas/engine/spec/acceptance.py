"""How often guesses turn out right: of one proposer, by its own confidence, by position and by sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from replicas.engine.sequence import Sequence
from replicas.engine.spec.lengths import HIGHEST
from replicas.engine.spec.proposer import LEVELS

_PRIOR = 8.0  # guesses that a level's own claim is worth before any were checked
_MEMORY = 0.998  # of what was seen, per checked guess of a level
_OF_SEQUENCE = 4.0  # guesses before a sequence counts as much as what others showed
_ENDED = 0.05  # weight of the sequence that ended last in what a new one is expected to be like
_RECENT = 0.95  # memory of a sequence per checked guess
_RELENTING = 0.98  # what is left of a sequence's bad name after each step in which it brought no guesses
_FIRST_GUESS = 0.6


class Acceptance:
    def __init__(self, max_depth: int) -> None:
        self._right = [_PRIOR * (i + 0.5) / LEVELS for i in range(LEVELS)]
        self._tried = [_PRIOR] * LEVELS
        self._by_depth = [_FIRST_GUESS] * max_depth
        self._sequences: dict[Sequence, tuple[float, float]] = {}  # right and expected to be right, lately
        self._new = 1.0  # the factor of a sequence that has shown nothing

    def probabilities(self, seq: Sequence, levels: Seq[int]) -> list[float]:
        """Of each guess of `seq` to be right if those before it are."""
        factor = self._factor(seq)
        return [min(factor * self._right[i] / self._tried[i], HIGHEST) for i in levels]

    def usual(self, seq: Sequence) -> list[float]:
        """The same for guesses that are not there yet, by depth."""
        factor = self._factor(seq)
        return [min(factor * right, HIGHEST) for right in self._by_depth]

    def record(self, seq: Sequence, levels: Seq[int], accepted: int) -> None:
        """Of guesses of these levels the first `accepted` were right and the next one, if there was one, wrong."""
        right, expected = self._sequences.get(seq, (0.0, 0.0))
        for depth, i in enumerate(levels[: accepted + 1]):
            hit = float(depth < accepted)
            expected = expected * _RECENT + self._right[i] / self._tried[i]
            right = right * _RECENT + hit
            self._right[i] = self._right[i] * _MEMORY + hit
            self._tried[i] = self._tried[i] * _MEMORY + 1
            self._by_depth[depth] += 0.03 * (hit - self._by_depth[depth])
        self._sequences[seq] = right, expected

    def idle(self, seq: Sequence) -> None:
        """`seq` brought no guesses: whatever spoke against them counts a little less in the next step."""
        known = self._sequences.get(seq)
        if known is not None:
            self._sequences[seq] = known[0] * _RELENTING, known[1] * _RELENTING
        self._by_depth[0] += 0.002 * (_FIRST_GUESS - self._by_depth[0])

    def forget(self, seq: Sequence) -> None:
        if seq in self._sequences:
            # Levels count guesses, and most guesses are those of sequences that are guessed well: a new sequence is
            # like other sequences, not like other guesses.
            self._new += _ENDED * (self._factor(seq) - self._new)
            del self._sequences[seq]

    def _factor(self, seq: Sequence) -> float:
        right, expected = self._sequences.get(seq, (0.0, 0.0))
        return (right + _OF_SEQUENCE * self._new) / (expected + _OF_SEQUENCE)
