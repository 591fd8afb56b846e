"""Which of a model's replicas are left alone because they keep failing.

A breaker exists only from a replica's first failure until its last one is forgotten: while all is well this is an empty
mapping, and nothing is counted.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator

from policies.breaker import Breaker, BreakerSettings, Outcome, Permit


class Spared:
    """By replica id. `now` is any clock that never runs backwards, the same for all calls."""

    def __init__(self) -> None:
        self._breakers: dict[str, Breaker] = {}
        self._rng = random.Random()

    def __bool__(self) -> bool:
        return bool(self._breakers)

    def names(self, now: float) -> Iterator[str]:
        """Those that may not be sent anything now."""
        return (name for name, breaker in self._breakers.items() if not breaker.can_acquire(now))

    def wait_s(self, names: Collection[str], now: float) -> float | None:
        """Seconds until the first of these may be tried again; None if none of them is left alone."""
        return min((self._breakers[name].wait_s(now) for name in self.names(now) if name in names), default=None)

    def forget(self, name: str) -> None:
        """Another process has taken its place, or nobody."""
        self._breakers.pop(name, None)

    def permit(self, name: str, now: float) -> Permit | None:
        """Around an attempt at a replica that has failed lately; None for all others, and when it may not be sent."""
        breaker = self._breakers.get(name)
        return None if breaker is None else breaker.acquire(now)

    def started(self, name: str, permit: Permit, now: float) -> None:
        if (breaker := self._breakers.get(name)) is not None:
            breaker.started(permit, now)

    def ended(self, name: str, permit: Permit | None, outcome: Outcome, settings: BreakerSettings, now: float) -> None:
        """The attempt is over. Without a permit only a failure counts: it is the first."""
        breaker = self._breakers.get(name)
        if breaker is None and outcome is Outcome.FAILURE:
            breaker = self._breakers[name] = Breaker(settings)
        if breaker is None:
            return
        breaker.settings = settings
        permit = permit or breaker.acquire(now)
        if permit is not None and not permit.ended:
            breaker.record(permit, outcome, now, self._rng)
        if breaker.spotless:
            del self._breakers[name]
