"""Which failures are worth another attempt, how long to pause before it, and what they say of whoever failed."""

from __future__ import annotations

import random
from functools import lru_cache

from gateway.config import Retries
from policies.breaker import BreakerSettings, Outcome, outcome_of
from replicas.protocol import EngineFault, QueueFull, ReplicaDraining, ReplicaLost, SignalboxError, Unavailable
from replicas.upstream_errors import UpstreamFailed, UpstreamTimeout

# The names of `retries.on`; whatever else goes wrong is never tried again.
_NAMES: tuple[tuple[type[SignalboxError], str], ...] = (
    (UpstreamTimeout, "timeout"),
    (UpstreamFailed, "failed"),
    (ReplicaDraining, "draining"),
    (QueueFull, "full"),
    (ReplicaLost, "lost"),
    (EngineFault, "fault"),
)
_LONGEST_COOLDOWN_S = 60.0


def may_retry(error: SignalboxError, retries: Retries) -> bool:
    """Whether a failure before the first token is one to try again after."""
    return any(isinstance(error, kind) and name in retries.on for kind, name in _NAMES)


def pause_s(error: SignalboxError | None, retries: Retries, attempt: int) -> float:
    """Seconds before the next attempt, `attempt` (from 0) having failed; by lot, so that callers get out of step."""
    if isinstance(error, QueueFull | ReplicaDraining):  # another replica may take it at once
        return 0.0
    return retries.backoff_s * float(2**attempt) * random.uniform(0.5, 1.5)


def later(error: SignalboxError, retries: Retries) -> SignalboxError:
    """The error; one that will pass has a time to come again."""
    if isinstance(error, Unavailable):
        error.retry_after_s = error.retry_after_s or retries.retry_after_s
    return error


def outcome_at_replica(error: BaseException | None) -> Outcome:
    """What the end of a request says of the replica of ours that had it: a full queue is no illness, a fault is."""
    if isinstance(error, EngineFault):
        return Outcome.FAILURE
    if isinstance(error, QueueFull | ReplicaDraining):
        return Outcome.NEUTRAL
    return outcome_of(error)


def breaker_settings(retries: Retries) -> BreakerSettings:
    return _settings(retries.breaker_failures, retries.breaker_cooldown_s)


@lru_cache(maxsize=64)
def _settings(failures: int, cooldown_s: float) -> BreakerSettings:
    return BreakerSettings(
        failures=failures, cooldown_s=cooldown_s, max_cooldown_s=max(cooldown_s, _LONGEST_COOLDOWN_S)
    )
