"""Rates that an engine measures of itself while it works; no hand-set constants."""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest sample in the moving averages: about ten steps of memory


class Meter:
    """prefill_rate: prompt tokens/s; decode_step_s: seconds of a step without prefill; block_release_rate: blocks/s."""

    def __init__(self) -> None:
        self.prefill_rate = 0.0
        self.decode_step_s = 0.0
        self.block_release_rate = 0.0
        self._busy_s = 0.0
        self._released = 0

    def record(self, seconds: float, prefill_tokens: int, released: int) -> None:
        """One step took `seconds`; `released` is the pool's running count of returned blocks."""
        if prefill_tokens:
            # What decodes in the same step cost is not the prompt's doing.
            alone = max(seconds - self.decode_step_s, seconds / 2)
            self.prefill_rate = _blend(self.prefill_rate, prefill_tokens / alone)
        else:
            self.decode_step_s = _blend(self.decode_step_s, seconds)
        self._busy_s += seconds
        if self._busy_s >= 1.0:
            self.block_release_rate = _blend(self.block_release_rate, (released - self._released) / self._busy_s)
            self._busy_s, self._released = 0.0, released


def _blend(old: float, new: float) -> float:
    return new if old == 0 else old + _WEIGHT * (new - old)
