"""Requests and tokens per minute, and requests at once: exact, and with a Retry-After that is a promise. Pure.

A token bucket for requests and one for tokens: each holds at most one minute's limit and refills evenly. In any t
seconds at most limit x (1 + t / 60) gets through, and limit / 60 a second in the long run. A bucket rather than a
sliding window, because after a burst a caller waits for the next token of the bucket, not for the burst to leave the
window, and because its whole state is two integers.

"Retry later" is true only if nobody else takes the place in the meantime, so a refusal *promises* one: the earliest
time at which the buckets can serve the request after everybody who was promised before. What has been promised is
out of reach for newcomers. A promise belongs to a `claimant`, any bytes by which the same request is known when it
comes again (a digest of key and body, say). From its time on it is taken out of the buckets; a claimant who comes
within GRACE_US finds it there; who does not come forfeits it, and it flows back. So a burst of refused requests that
are never repeated costs nobody more than the grace. Two requests of one claimant are interchangeable.

Concurrency cannot be promised, since nobody knows when a running request ends: such a refusal names no time, and nor
does one to a caller behind MOST_PROMISES others or one that is larger than the whole bucket.

    level is kept in 1/60,000,000 of a request or token, time in whole microseconds: a refill is level += limit * dt.

Knows no clock and no database. `gateway.ledger.limits` keeps the same state for several gateways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from policies.budget import Scope, Scoped, Subject, remembered

if TYPE_CHECKING:
    from policies import document_limits

UNIT = 60_000_000
# A Retry-After header rounds up by less than a second; the rest is the network's and the client's.
GRACE_US = 5_000_000
MOST_PROMISES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """Per minute, and at once; None limits nothing."""

    scope: Scope
    requests: int | None = None
    tokens: int | None = None
    concurrency: int | None = None

    def merged(self, other: RateLimit) -> RateLimit:
        """The stricter of both, for the same scope."""
        assert self.scope == other.scope, "only limits over one scope merge"
        return RateLimit(
            scope=self.scope,
            requests=_least(self.requests, other.requests),
            tokens=_least(self.tokens, other.tokens),
            concurrency=_least(self.concurrency, other.concurrency),
        )


@dataclass(frozen=True)
class RateLimits:
    """All limits of one policy generation."""

    limits: tuple[RateLimit, ...] = ()
    _known: dict[Subject, tuple[RateLimit, ...]] = field(default_factory=dict, compare=False, repr=False)
    _scoped: Scoped[RateLimit] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_scoped", Scoped((limit.scope, limit) for limit in self.limits))

    def applying(self, subject: Subject) -> tuple[RateLimit, ...]:
        """What limits a request of this subject, bound to it, in a fixed order."""
        return remembered(self._known, subject, self._find)

    def _find(self, subject: Subject) -> tuple[RateLimit, ...]:
        found: dict[str, RateLimit] = {}
        for limit in self._scoped.concerning(subject):
            scope = limit.scope.bind(subject)
            assert scope is not None, "the index found a rule that does not concern the subject"
            bound = RateLimit(scope=scope, requests=limit.requests, tokens=limit.tokens, concurrency=limit.concurrency)
            found[str(scope)] = found[str(scope)].merged(bound) if str(scope) in found else bound
        return tuple(found[name] for name in sorted(found))


@dataclass(slots=True)
class Promise:
    due_us: int
    claimant: bytes
    tokens: int


@dataclass(slots=True)
class Gate:
    """The state behind one limit. Levels are None until that kind was limited for the first time.

    `held`: promises whose time has come, already taken out of the buckets. `promised`: those to come, in time's order.
    """

    at_us: int = 0
    requests: int | None = None
    tokens: int | None = None
    in_flight: int = 0
    held: list[Promise] = field(default_factory=list)
    promised: list[Promise] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """`kind`: "requests", "tokens" or "concurrency". retry_after_us None: no time can be promised."""

    kind: str
    limit: RateLimit
    retry_after_us: int | None


Gates = Sequence[tuple[RateLimit, Gate]]


def admit(gates: Gates, now_us: int, tokens: int, claimant: bytes, *, fresh: bool = False) -> Refusal | None:
    """Let a request of so many tokens (prompt and most completion) through all gates, or through none.

    `fresh` says that this is known to be a first try, which cannot claim what was promised to another.
    A refusal leaves a promise in every gate, unless it names no time.
    """
    for limit, gate in gates:
        advance(limit, gate, now_us)
    for limit, gate in gates:
        if limit.concurrency is not None and gate.in_flight >= limit.concurrency:
            return Refusal(kind="concurrency", limit=limit, retry_after_us=None)
    claims = [None if fresh else _held(gate, claimant, tokens) for _, gate in gates]
    for (limit, gate), claim in zip(gates, claims, strict=True):
        if claim is None and (kind := _first_short(limit, gate, tokens)):
            return _promise(gates, Refusal(kind=kind, limit=limit, retry_after_us=None), tokens, claimant)
    for (limit, gate), claim in zip(gates, claims, strict=True):
        if claim is None:
            _take(gate, 1, tokens)
        else:
            gate.held.remove(claim)
            _pour(limit, gate, 0, claim.tokens - tokens)
        gate.in_flight += 1
    return None


def finish(limit: RateLimit, gate: Gate, now_us: int, unused_tokens: int, *, ran: bool = True) -> None:
    """An admitted request has ended: give back the tokens it did not use (negative: it used more than it asked for),
    and the request itself where it never ran.
    """
    advance(limit, gate, now_us)
    gate.in_flight = max(0, gate.in_flight - 1)
    _pour(limit, gate, 0 if ran else 1, unused_tokens)


def advance(limit: RateLimit, gate: Gate, now_us: int) -> None:
    """Refill up to `now_us`; promises come due and lapse on the way, each at its own time. Time never runs back."""
    if gate.requests is None and limit.requests is not None:
        gate.requests = limit.requests * UNIT
    if gate.tokens is None and limit.tokens is not None:
        gate.tokens = limit.tokens * UNIT
    while True:
        due = gate.promised[0].due_us if gate.promised else None
        lapse = gate.held[0].due_us + GRACE_US if gate.held else None
        moment = min((at for at in (due, lapse) if at is not None), default=None)
        if moment is None or moment > now_us:
            break
        _refill(limit, gate, moment)
        if moment == due:
            promise = gate.promised.pop(0)
            _take(gate, 1, promise.tokens)
            gate.held.append(promise)
        else:
            promise = gate.held.pop(0)
            _pour(limit, gate, 1, promise.tokens)
    _refill(limit, gate, now_us)


@dataclass(frozen=True, slots=True)
class Standing:
    """What the x-ratelimit headers say of one kind: the limit, what could be had now, seconds until it is whole."""

    limit: int
    remaining: int
    reset_s: float


def standing(limit: RateLimit, gate: Gate) -> dict[str, Standing]:
    """By kind ("requests", "tokens"), at the gate's own time: call after `admit`, `finish` or `advance`."""
    spare_requests, spare_tokens = _spare(limit, gate)
    promised_tokens = sum(promise.tokens for promise in gate.promised)
    kinds = (
        ("requests", limit.requests, gate.requests, spare_requests, len(gate.promised)),
        ("tokens", limit.tokens, gate.tokens, spare_tokens, promised_tokens),
    )
    found = {}
    for kind, most, level, spare, promised in kinds:
        if most is not None and level is not None:
            missing = max(0, (most + promised) * UNIT - level)
            found[kind] = Standing(most, max(0, spare // UNIT), missing / most / 1e6)
    return found


def headers(standings: Iterable[Mapping[str, Standing]]) -> list[tuple[bytes, bytes]]:
    """x-ratelimit-{limit,remaining,reset}-{requests,tokens} of the limit with the least left of each kind."""
    tightest: dict[str, Standing] = {}
    for each in standings:
        for kind, one in each.items():
            if kind not in tightest or one.remaining < tightest[kind].remaining:
                tightest[kind] = one
    lines = []
    for kind, one in tightest.items():
        values = (("limit", str(one.limit)), ("remaining", str(one.remaining)), ("reset", duration(one.reset_s)))
        lines += [(f"x-ratelimit-{what}-{kind}".encode(), value.encode()) for what, value in values]
    return lines


def duration(seconds: float) -> str:
    """As OpenAI writes it: "0s", "120ms", "1.5s", "6m0s"; rounded up to a millisecond."""
    milliseconds = -int(-seconds * 1000 // 1)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{text}" if minutes else text


def from_document(rules: Iterable[document_limits.RateLimit]) -> RateLimits:
    """The policy document's section `rate_limits`."""
    return RateLimits(
        tuple(
            RateLimit(
                scope=Scope(key=rule.key, team=rule.team, model=rule.model),
                requests=rule.requests_per_minute,
                tokens=rule.tokens_per_minute,
                concurrency=rule.concurrency,
            )
            for rule in rules
        )
    )


# ---------------------------------------------------------------- the buckets


def _refill(limit: RateLimit, gate: Gate, now_us: int) -> None:
    elapsed = now_us - gate.at_us
    if elapsed <= 0:
        return
    gate.at_us = now_us
    gate.requests = _refilled(gate.requests, limit.requests, elapsed)
    gate.tokens = _refilled(gate.tokens, limit.tokens, elapsed)


def _refilled(level: int | None, most: int | None, elapsed_us: int) -> int | None:
    return level if level is None or most is None else min(most * UNIT, level + most * elapsed_us)


def _take(gate: Gate, requests: int, tokens: int) -> None:
    if gate.requests is not None:
        gate.requests -= requests * UNIT
    if gate.tokens is not None:
        gate.tokens -= tokens * UNIT


def _pour(limit: RateLimit, gate: Gate, requests: int, tokens: int) -> None:
    _take(gate, -requests, -tokens)
    if gate.requests is not None and limit.requests is not None:
        gate.requests = min(gate.requests, limit.requests * UNIT)
    if gate.tokens is not None and limit.tokens is not None:
        gate.tokens = min(gate.tokens, limit.tokens * UNIT)


def _held(gate: Gate, claimant: bytes, tokens: int) -> Promise | None:
    return next((p for p in gate.held if p.claimant == claimant and p.tokens >= tokens), None)


def _spare(limit: RateLimit, gate: Gate) -> tuple[int, int]:
    """What could be taken now without breaking a promise, in UNITs; a kind without a limit has no end of it."""
    requests, tokens = gate.requests, gate.tokens
    spare_requests = _endless(limit.requests, requests)
    spare_tokens = _endless(limit.tokens, tokens)
    at_us = gate.at_us
    for promise in gate.promised:
        requests = _refilled(requests, limit.requests, promise.due_us - at_us)
        tokens = _refilled(tokens, limit.tokens, promise.due_us - at_us)
        requests = None if requests is None else requests - UNIT
        tokens = None if tokens is None else tokens - promise.tokens * UNIT
        at_us = promise.due_us
        spare_requests = min(spare_requests, _endless(limit.requests, requests))
        spare_tokens = min(spare_tokens, _endless(limit.tokens, tokens))
    return spare_requests, spare_tokens


def _endless(most: int | None, level: int | None) -> int:
    return 2**62 if most is None or level is None else level


def _first_short(limit: RateLimit, gate: Gate, tokens: int) -> str | None:
    """The kind of which there is too little now, promises kept."""
    # almost always decided here while many wait, without a look at all their promises
    if _endless(limit.requests, gate.requests) < UNIT:
        return "requests"
    if _endless(limit.tokens, gate.tokens) < tokens * UNIT:
        return "tokens"
    requests_left, tokens_left = _spare(limit, gate)
    return "requests" if requests_left < UNIT else "tokens" if tokens_left < tokens * UNIT else None


def _promise(gates: Gates, refusal: Refusal, tokens: int, claimant: bytes) -> Refusal:
    """The refusal with its time, the promise noted in every gate."""
    if any(len(gate.promised) + len(gate.held) >= MOST_PROMISES for _, gate in gates):
        return refusal
    now_us = max(gate.at_us for _, gate in gates)
    due_us = now_us + 1  # a promise that is due now would be held already
    for limit, gate in gates:
        earliest = _earliest(limit, gate, tokens)
        if earliest is None:
            return Refusal(kind="tokens", limit=limit, retry_after_us=None)
        due_us = max(due_us, earliest)
    for _, gate in gates:
        gate.promised.append(Promise(due_us, claimant, tokens))
    return Refusal(kind=refusal.kind, limit=refusal.limit, retry_after_us=due_us - now_us)


def _earliest(limit: RateLimit, gate: Gate, tokens: int) -> int | None:
    """When both buckets can serve one more request after all who were promised; None: never."""
    if limit.tokens is not None and tokens > limit.tokens:
        return None
    requests, level, at_us = gate.requests, gate.tokens, gate.at_us
    for promise in gate.promised:
        requests = _refilled(requests, limit.requests, promise.due_us - at_us)
        level = _refilled(level, limit.tokens, promise.due_us - at_us)
        requests = None if requests is None else requests - UNIT
        level = None if level is None else level - promise.tokens * UNIT
        at_us = promise.due_us
    waits = [0]
    for have, most, wanted in ((requests, limit.requests, 1), (level, limit.tokens, tokens)):
        if have is not None and most is not None:
            waits.append(-((have - wanted * UNIT) // most))
    return at_us + max(waits)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
