"""Where one request's time goes: in the queue, to its first token, to its last. Told instants, it knows no clock."""

from __future__ import annotations

from replicas.protocol import Timing


class Phases:
    """Instants in seconds of any one clock. All choices of a request share one."""

    __slots__ = ("_accepted", "_first", "_scheduled")

    def __init__(self, accepted: float) -> None:
        self._accepted = accepted
        self._scheduled: float | None = None
        self._first: float | None = None

    def scheduled(self, now: float) -> None:
        """A step began that computes some of it; only the first such step counts."""
        if self._scheduled is None:
            self._scheduled = now

    def token(self, now: float, *, last: bool, cached: int = 0) -> Timing | None:
        """A token is there; `last`: the request's. What to tell with it, which for most tokens is nothing.

        cached: tokens of its prompt that were not computed.
        """
        if self._first is not None and not last:
            return None
        assert self._scheduled is not None, "a token came from a step that nobody reported"
        if self._first is None:
            self._first = now
        return Timing(
            queued_s=self._scheduled - self._accepted,
            prefill_s=self._first - self._scheduled,
            decode_s=now - self._first,
            cached_tokens=cached,
        )
