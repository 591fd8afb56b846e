"""A circuit breaker for one replica or upstream: pure, with the time and the dice as arguments.

                 too many failures, or told to wait
        CLOSED ───────────────────────────────────────► OPEN
          ▲  ▲                                         │    ▲
          │  └───────── the probe's first token        │    │ the probe fails: the cooldown doubles
          │                                 cooldown over   │
          └──────────────────────────────── HALF-OPEN ◄┘────┘   (one probe at a time)

    permit = breaker.acquire(now)                # None: do not send; `wait_s(now)` says how long
    ...                                          # send; breaker.started(permit, now) when the first token is there
    breaker.record(permit, outcome_of(error), now, rng, retry_after_s)       # once, in `finally`

A failure is an Unavailable: nobody there, too slow, cut off, overloaded. A RequestError is an answer, so it speaks for
the replica; what says nothing of its health (the caller left or had no more time, our own configuration) is neither.
Knows no clock, no sockets, and not what is on the other side.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from replicas.protocol import ConfigError, DeadlineExceeded, RequestError, Unavailable


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Outcome(StrEnum):
    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """When to stop sending and for how long.

    Opens after `failures` in a row, or when at least `share` of the requests that ended in the last `window_s` seconds
    failed and there were `min_requests` of them. The first cooldown is `cooldown_s`; each failed probe doubles it up to
    `max_cooldown_s`; it is lengthened by lot by up to `jitter` of itself, so that gateways do not probe in step. A
    Retry-After is obeyed up to `max_retry_after_s`.
    """

    failures: int = 5
    share: float = 0.5
    window_s: float = 30.0
    min_requests: int = 20
    cooldown_s: float = 1.0
    max_cooldown_s: float = 60.0
    jitter: float = 0.2
    max_retry_after_s: float = 600.0

    def __post_init__(self) -> None:
        if self.failures < 1 or self.min_requests < 1:
            raise ConfigError("failures and min_requests of a circuit breaker must be at least 1")
        if not (0 < self.share <= 1 and self.window_s > 0 and 0 <= self.jitter <= 1):
            raise ConfigError("a circuit breaker needs 0 < share <= 1, window_s > 0 and 0 <= jitter <= 1")
        if not (0 < self.cooldown_s <= self.max_cooldown_s and self.max_retry_after_s >= 0):
            raise ConfigError("a circuit breaker needs 0 < cooldown_s <= max_cooldown_s and max_retry_after_s >= 0")


@dataclass(slots=True, eq=False)
class Permit:
    """Leave to send one request. `epoch` is the breaker's when it was given: later verdicts of older ones are void."""

    epoch: int
    probe: bool
    ended: bool = False


@dataclass(slots=True)
class _Bucket:
    """What ended in one slice of the window."""

    slice: int
    requests: int = 0
    failures: int = 0


# Slices of the window: memory is bounded by them, and what is forgotten is forgotten a slice at a time.
_SLICES = 10


def outcome_of(error: BaseException | None) -> Outcome:
    """What the end of a request says of the replica that had it."""
    if isinstance(error, DeadlineExceeded):
        return Outcome.NEUTRAL  # the caller's clock ran out; it may have hung, or not
    if error is None or isinstance(error, RequestError):
        return Outcome.SUCCESS
    return Outcome.FAILURE if isinstance(error, Unavailable) else Outcome.NEUTRAL


class Breaker:
    """One replica's. `now` is any clock that never runs backwards, in seconds, the same for all calls."""

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        self.settings = settings or BreakerSettings()
        self._state = BreakerState.CLOSED
        self._epoch = 0
        self._in_a_row = 0
        self._window: deque[_Bucket] = deque()
        self._cooldown_s = 0.0
        self._until = 0.0
        self._probe: Permit | None = None

    def state(self, now: float) -> BreakerState:
        if self._state is BreakerState.OPEN and now >= self._until:
            return BreakerState.HALF_OPEN
        return self._state

    @property
    def spotless(self) -> bool:
        """Closed, and no failure of the last window is remembered: as good as new."""
        return self._state is BreakerState.CLOSED and not any(bucket.failures for bucket in self._window)

    @property
    def cooldown_s(self) -> float:
        """Seconds of the latest cooldown without its jitter or a Retry-After; 0 once closed again."""
        return self._cooldown_s

    def wait_s(self, now: float) -> float:
        """Seconds until a request may be sent; 0 now, or as soon as the probe that is under way has ended."""
        return max(0.0, self._until - now) if self._state is BreakerState.OPEN else 0.0

    def can_acquire(self, now: float) -> bool:
        if self._state is BreakerState.CLOSED:
            return True
        return now >= self._until and self._probe is None

    def acquire(self, now: float) -> Permit | None:
        """Leave to send one request, which `record` must end; None while the replica is being spared."""
        if not self.can_acquire(now):
            return None
        permit = Permit(self._epoch, probe=self._state is BreakerState.OPEN)
        if permit.probe:
            self._probe = permit
        return permit

    def started(self, permit: Permit, now: float) -> None:
        """The first token has come. For a probe that is enough: the replica works again for everybody."""
        if permit is self._probe:
            self._close()
            permit.epoch, permit.probe = self._epoch, False

    def record(
        self,
        permit: Permit,
        outcome: Outcome,
        now: float,
        rng: random.Random,
        retry_after_s: float | None = None,
    ) -> None:
        """The request has ended. `retry_after_s`: what the other side asked for; it opens the breaker by itself."""
        assert not permit.ended, "a permit ends once"
        permit.ended = True
        if permit is self._probe:
            self._probe = None
        if permit.epoch != self._epoch:
            return  # sent before the breaker last opened or closed; that verdict has been acted upon
        if permit.probe:
            self._judge_probe(outcome, now, rng, retry_after_s)
        elif outcome is not Outcome.NEUTRAL:
            self._count(outcome, now)
            if outcome is Outcome.FAILURE and (retry_after_s or self._too_many()):
                self._open(now, rng, retry_after_s)

    def _judge_probe(self, outcome: Outcome, now: float, rng: random.Random, retry_after_s: float | None) -> None:
        if outcome is Outcome.SUCCESS:
            self._close()
        elif outcome is Outcome.FAILURE:
            self._open(now, rng, retry_after_s)
        # neutral: nothing was learnt, the next request is the probe

    def _count(self, outcome: Outcome, now: float) -> None:
        failed = outcome is Outcome.FAILURE
        self._in_a_row = self._in_a_row + 1 if failed else 0
        current = int(now / self.settings.window_s * _SLICES)
        if not self._window or self._window[-1].slice != current:
            self._window.append(_Bucket(current))
        self._window[-1].requests += 1
        self._window[-1].failures += failed
        while self._window[0].slice <= current - _SLICES:
            self._window.popleft()

    def _too_many(self) -> bool:
        if self._in_a_row >= self.settings.failures:
            return True
        requests = sum(bucket.requests for bucket in self._window)
        failures = sum(bucket.failures for bucket in self._window)
        return requests >= self.settings.min_requests and failures >= self.settings.share * requests

    def _open(self, now: float, rng: random.Random, retry_after_s: float | None) -> None:
        settings = self.settings
        doubled = self._cooldown_s * 2 if self._cooldown_s else settings.cooldown_s
        self._cooldown_s = min(doubled, settings.max_cooldown_s)
        asked = min(retry_after_s or 0.0, settings.max_retry_after_s)
        self._until = now + max(self._cooldown_s, asked) * (1 + settings.jitter * rng.random())
        self._state = BreakerState.OPEN
        self._forget()

    def _close(self) -> None:
        self._state = BreakerState.CLOSED
        self._cooldown_s = 0.0
        self._forget()

    def _forget(self) -> None:
        self._epoch += 1
        self._in_a_row = 0
        self._window.clear()
        self._probe = None
