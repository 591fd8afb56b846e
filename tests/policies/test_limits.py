"""Rate limits let through what they say and no more, and whoever waits as long as told gets in."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import document_limits, limits
from policies.budget import Scope, Subject
from policies.limits import GRACE_US, MOST_PROMISES, Gate, RateLimit, RateLimits, Refusal, admit, finish

SCOPE = Scope(key="alice")
SECOND = 1_000_000


def limit(**most: int) -> RateLimit:
    return RateLimit(scope=SCOPE, **most)


def ask(rule: RateLimit, gate: Gate, now_us: int, tokens: int = 1, who: bytes = b"") -> Refusal | None:
    return admit([(rule, gate)], now_us, tokens, who)


def test_a_new_gate_lets_one_minutes_worth_through_at_once() -> None:
    rule, gate = limit(requests=5), Gate()
    assert [ask(rule, gate, 0) is None for _ in range(7)] == [True] * 5 + [False] * 2


def test_those_refused_are_given_places_one_after_another() -> None:
    rule, gate = limit(requests=60), Gate()
    refusals = [ask(rule, gate, 0, who=bytes([n])) for n in range(63)][60:]
    assert [refusal and refusal.retry_after_us for refusal in refusals] == [1 * SECOND, 2 * SECOND, 3 * SECOND]


def test_a_newcomer_does_not_take_a_promised_place() -> None:
    rule, gate = limit(requests=60), Gate()
    for _ in range(60):
        ask(rule, gate, 0, who=b"first")
    assert ask(rule, gate, 0, who=b"waiting") is not None
    assert ask(rule, gate, SECOND, who=b"newcomer") is not None
    assert ask(rule, gate, SECOND + GRACE_US // 2, who=b"waiting") is None


def test_a_known_first_try_does_not_take_what_was_promised_to_the_same_bytes() -> None:
    rule, gate = limit(requests=60), Gate()
    for _ in range(61):
        ask(rule, gate, 0, who=b"same")
    assert admit([(rule, gate)], SECOND, 1, b"same", fresh=True) is not None
    assert admit([(rule, gate)], SECOND, 1, b"same", fresh=False) is None


def test_promises_that_nobody_takes_flow_back() -> None:
    """A burst of 500 refusals, never repeated, does not lock the key for the minutes that it promised away."""
    rule, gate = limit(requests=60), Gate()
    for number in range(560):
        ask(rule, gate, 0, who=number.to_bytes(2, "big"))
    later = GRACE_US + 3 * SECOND
    assert [ask(rule, gate, later, who=b"new") is None for _ in range(5)] == [True, True, True, False, False]


def test_too_many_waiting_are_told_no_time() -> None:
    rule, gate = limit(requests=1), Gate()
    refusals = [ask(rule, gate, 0, who=b"x") for _ in range(MOST_PROMISES + 2)]
    assert refusals[-2] is not None
    assert refusals[-2].retry_after_us is not None
    assert refusals[-1] is not None
    assert refusals[-1].retry_after_us is None


def test_a_request_larger_than_the_bucket_is_told_no_time() -> None:
    refusal = ask(limit(tokens=100), Gate(), 0, tokens=101)
    assert refusal is not None
    assert (refusal.kind, refusal.retry_after_us) == ("tokens", None)


def test_unused_tokens_come_back_and_a_request_that_never_ran_altogether() -> None:
    rule, gate = limit(requests=2, tokens=100), Gate()
    assert ask(rule, gate, 0, tokens=100) is None
    finish(rule, gate, 0, 60)
    assert ask(rule, gate, 0, tokens=60) is None
    finish(rule, gate, 0, 60, ran=False)
    assert ask(rule, gate, 0, tokens=60) is None
    assert ask(rule, gate, 0, tokens=1) is not None


def test_what_was_used_beyond_the_reservation_is_owed() -> None:
    rule, gate = limit(tokens=60), Gate()
    assert ask(rule, gate, 0, tokens=60) is None
    finish(rule, gate, 0, -30)
    refusal = ask(rule, gate, 0, tokens=1)
    assert refusal is not None
    assert refusal.retry_after_us == 31 * SECOND


def test_concurrency_counts_what_runs() -> None:
    rule, gate = limit(concurrency=2), Gate()
    assert [ask(rule, gate, 0) is None for _ in range(3)] == [True, True, False]
    finish(rule, gate, 0, 0)
    assert ask(rule, gate, 0) is None


def test_all_gates_let_a_request_through_or_none() -> None:
    wide, narrow = limit(requests=10), RateLimit(scope=Scope(team="t"), requests=1)
    gates = [(wide, Gate()), (narrow, Gate())]
    assert admit(gates, 0, 1, b"a") is None
    for _ in range(5):
        assert admit(gates, 0, 1, b"b") is not None
    assert limits.standing(*gates[0])["requests"].remaining == 9


def test_headers_tell_of_the_tightest_limit() -> None:
    wide, narrow = limit(requests=100, tokens=6000), RateLimit(scope=Scope(team="t"), requests=60)
    gates = [(wide, Gate()), (narrow, Gate())]
    assert admit(gates, 0, 1000, b"") is None
    lines = dict(limits.headers(limits.standing(*gate) for gate in gates))
    assert lines == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"5000",
        b"x-ratelimit-reset-tokens": b"10s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (360.25, "6m0.25s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert limits.duration(seconds) == text


def test_the_documents_limits_become_ours_and_merge() -> None:
    rules = [
        document_limits.RateLimit.model_validate({"key": "*", "requests_per_minute": 10, "concurrency": 3}),
        document_limits.RateLimit.model_validate({"key": "alice", "requests_per_minute": 20, "tokens_per_minute": 5}),
    ]
    ours: RateLimits = limits.from_document(rules)
    assert ours.applying(Subject("alice", "t", "m")) == (limit(requests=10, tokens=5, concurrency=3),)
    assert ours.applying(Subject("bob", "t", "m")) == (RateLimit(scope=Scope(key="bob"), requests=10, concurrency=3),)


@dataclass(order=True)
class Try:
    at_us: int
    number: int
    tokens: int
    told: bool


tries = st.lists(
    st.tuples(st.integers(0, 90 * SECOND), st.integers(1, 50), st.integers(0, 50), st.booleans()),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.integers(1, 40),
    tokens=st.integers(50, 400),
    second=st.integers(1, 60),
    arrivals=tries,
    lateness_us=st.integers(0, GRACE_US - SECOND),
    whole_seconds=st.booleans(),
)
def test_whoever_waits_as_long_as_told_gets_in(
    requests: int,
    tokens: int,
    second: int,
    arrivals: list[tuple[int, int, int, bool]],
    lateness_us: int,
    whole_seconds: bool,
) -> None:
    """Everybody who was refused comes again after Retry-After (in the header's whole seconds or to the microsecond, and
    up to some seconds late), among newcomers, some of whom pass one gate only, and requests that end and give back.
    Nobody is refused twice, and no bucket is ever overdrawn.
    """
    rule = limit(requests=requests, tokens=tokens)
    both = [(rule, Gate()), (RateLimit(scope=Scope(team="t"), requests=second), Gate())]
    queue = [Try(at, number, cost, False) for number, (at, cost, _, _) in enumerate(arrivals)]
    unused = [cost * share // 50 for _, cost, share, _ in arrivals]
    heapq.heapify(queue)
    admitted: list[int] = []
    admitted_by_both: list[int] = []
    while queue:
        now = heapq.heappop(queue)
        gates = both if arrivals[now.number][3] else both[:1]
        refusal = admit(gates, now.at_us, now.tokens, now.number.to_bytes(4, "big"))
        for _, gate in gates:
            assert min(gate.requests or 0, gate.tokens or 0) >= 0, "more was promised than there is"
        if refusal is None:
            admitted.append(now.at_us)
            if len(gates) == 2:
                admitted_by_both.append(now.at_us)
            for each, gate in gates:
                finish(each, gate, now.at_us, 0 if now.told else unused[now.number])
            continue
        assert not now.told, f"told to wait, and refused again: {refusal}"
        assert refusal.retry_after_us is not None
        wait_us = refusal.retry_after_us
        if whole_seconds:
            wait_us = math.ceil(wait_us / SECOND) * SECOND
        heapq.heappush(queue, Try(now.at_us + wait_us + lateness_us, now.number, now.tokens, True))
    assert len(admitted) == len(arrivals)
    for most, times in ((requests, admitted), (second, admitted_by_both)):
        for first, last in combinations(range(len(times)), 2):
            span_us = times[last] - times[first] + GRACE_US
            assert last - first + 1 <= most + most * span_us / 60e6


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(1, 60)), max_size=80), st.integers(60, 120))
def test_without_promises_it_is_a_token_bucket(arrivals: list[tuple[int, int]], most: int) -> None:
    """Against a naive bucket in exact fractions."""
    rule, gate = limit(tokens=most), Gate()
    level, now = Fraction(most), 0
    for gap, cost in arrivals:
        now += gap
        level = min(Fraction(most), level + Fraction(most * gap, 60 * SECOND))
        expected = level >= cost
        if expected:
            level -= cost
        assert (ask(rule, gate, now, tokens=cost) is None) == expected
        gate.promised.clear()
