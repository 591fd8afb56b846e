"""What steps cost, learnt from those that ran: how fast one can be at the very best, and when more seats stop paying.

A step that only decodes costs about `base + each * sequences` seconds. On a GPU `each` is next to nothing and every
one pays; on a CPU it soon is all there is, and further ones make every step longer and nothing faster.
"""

from __future__ import annotations

_MEMORY = 0.98  # weight of what was known before, per sample: about the last fifty decode steps
_SAMPLES = 8


class Pace:
    def __init__(self) -> None:
        self.least_step_s = 0.0
        self.least_token_s = 0.0
        self._weight = self._n = self._s = self._nn = self._ns = 0.0

    def record(self, seconds: float, sequences: int, prefill_tokens: int, budget: int) -> None:
        self.least_step_s = min(self.least_step_s or seconds, seconds)
        if prefill_tokens > budget // 2:
            per_token = seconds / prefill_tokens
            self.least_token_s = min(self.least_token_s or per_token, per_token)
        if prefill_tokens == 0:
            self._weight = self._weight * _MEMORY + 1
            self._n = self._n * _MEMORY + sequences
            self._s = self._s * _MEMORY + seconds
            self._nn = self._nn * _MEMORY + sequences * sequences
            self._ns = self._ns * _MEMORY + sequences * seconds

    def least_s(self, tokens: int, outputs: int, budget: int) -> float:
        """Seconds to compute a prompt's `tokens` and bring `outputs` tokens if all goes as fast as it ever went."""
        steps = -(-tokens // budget)
        return max(steps * self.least_step_s, tokens * self.least_token_s) + (outputs - 1) * self.least_step_s

    def tokens_of_a_step(self, least: int) -> int:
        """Prompt tokens that take as long as the shortest step did, `least` at the least."""
        return max(least, int(self.least_step_s / self.least_token_s)) if self.least_token_s else least

    def seats_that_pay(self, share: float, most: int) -> int:
        """How many sequences at once bring `share` of the tokens a second that any number could; at most `most`.

        `most` while the steps so far do not tell, which they cannot as long as they are all of one size.
        """
        if self._weight < _SAMPLES:
            return most
        spread = self._weight * self._nn - self._n * self._n
        each = (self._weight * self._ns - self._n * self._s) / spread if spread > 1e-9 * self._nn else 0.0
        base = (self._s - each * self._n) / self._weight
        if each <= 0 or base <= 0:
            return most
        return min(most, max(1, round(share / (1 - share) * base / each)))
