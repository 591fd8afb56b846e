from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.breaker import Breaker, BreakerSettings, BreakerState, Outcome, Permit, outcome_of
from replicas.protocol import (
    ConfigError,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    ModelNotFound,
    NoReplica,
    QueueFull,
    ReplicaLost,
    Unavailable,
)

PLAIN = BreakerSettings(failures=3, min_requests=10, window_s=10, cooldown_s=1, max_cooldown_s=8, jitter=0)


class Worst(random.Random):
    """Dice that always fall on the longest wait."""

    def random(self) -> float:
        return 1.0


def end(breaker: Breaker, outcome: Outcome, now: float, retry_after_s: float | None = None) -> None:
    permit = breaker.acquire(now)
    assert permit is not None
    breaker.record(permit, outcome, now, random.Random(0), retry_after_s)


def opened() -> Breaker:
    breaker = Breaker(PLAIN)
    for _ in range(PLAIN.failures):
        end(breaker, Outcome.FAILURE, 0)
    assert breaker.state(0) is BreakerState.OPEN
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker(PLAIN)
    for outcome in (Outcome.FAILURE, Outcome.FAILURE, Outcome.SUCCESS, Outcome.FAILURE, Outcome.FAILURE):
        end(breaker, outcome, 0)
    assert breaker.state(0) is BreakerState.CLOSED
    end(breaker, Outcome.FAILURE, 0)
    assert breaker.state(0) is BreakerState.OPEN
    assert breaker.acquire(0.999) is None
    assert breaker.wait_s(0.25) == 0.75


def test_a_share_of_failures_in_the_window_opens_it() -> None:
    breaker = Breaker(PLAIN)
    for number in range(9):
        end(breaker, Outcome.FAILURE if number % 2 else Outcome.SUCCESS, now=number * 0.5)
    assert breaker.state(4.5) is BreakerState.CLOSED  # four of nine, and too few to judge
    end(breaker, Outcome.FAILURE, 4.5)
    assert breaker.state(4.5) is BreakerState.OPEN


def test_failures_older_than_the_window_are_forgotten() -> None:
    breaker = Breaker(PLAIN)
    for number in range(9):
        end(breaker, Outcome.FAILURE if number % 2 else Outcome.SUCCESS, now=0)
    end(breaker, Outcome.FAILURE, 11)
    assert breaker.state(11) is BreakerState.CLOSED


def test_half_open_lets_one_probe_through_and_its_first_token_closes() -> None:
    breaker = opened()
    probe = breaker.acquire(1)
    assert probe is not None
    assert probe.probe
    assert breaker.state(1) is BreakerState.HALF_OPEN
    assert breaker.acquire(1) is None
    breaker.started(probe, 1.2)
    assert breaker.state(1.2) is BreakerState.CLOSED
    assert breaker.acquire(1.2) is not None
    breaker.record(probe, Outcome.FAILURE, 2, random.Random(0))  # its end counts like any other's
    assert breaker.state(2) is BreakerState.CLOSED


def test_each_failed_probe_doubles_the_cooldown_up_to_the_bound_and_success_resets_it() -> None:
    breaker, now, waits = opened(), 0.0, []
    for _ in range(5):
        waits.append(breaker.wait_s(now))
        now += breaker.wait_s(now)
        end(breaker, Outcome.FAILURE, now)
    assert waits == [1, 2, 4, 8, 8]
    end(breaker, Outcome.SUCCESS, now + 8)
    for _ in range(3):
        end(breaker, Outcome.FAILURE, now + 8)
    assert breaker.wait_s(now + 8) == 1


def test_a_probe_that_teaches_nothing_hands_its_turn_to_the_next() -> None:
    breaker = opened()
    end(breaker, Outcome.NEUTRAL, 1)
    assert breaker.state(1) is BreakerState.HALF_OPEN
    end(breaker, Outcome.SUCCESS, 1)
    assert breaker.state(1) is BreakerState.CLOSED


def test_retry_after_opens_at_once_is_waited_for_and_is_bounded() -> None:
    breaker = Breaker(PLAIN)
    end(breaker, Outcome.FAILURE, 0, retry_after_s=20)
    assert breaker.wait_s(0) == 20
    for bounded, wait in ((PLAIN, 600), (BreakerSettings(jitter=0, max_retry_after_s=5), 5)):
        greedy = Breaker(bounded)
        end(greedy, Outcome.FAILURE, 0, retry_after_s=1e9)
        assert greedy.wait_s(0) == wait


def test_retry_after_shorter_than_the_cooldown_does_not_shorten_it() -> None:
    breaker = opened()
    end(breaker, Outcome.FAILURE, 1, retry_after_s=0.5)
    assert breaker.wait_s(1) == 2


def test_jitter_lengthens_by_its_share_at_most_and_comes_from_the_given_dice() -> None:
    def wait(rng: random.Random) -> float:
        breaker = Breaker(BreakerSettings(failures=1, cooldown_s=10, jitter=0.2))
        permit = breaker.acquire(0)
        assert permit is not None
        breaker.record(permit, Outcome.FAILURE, 0, rng)
        return breaker.wait_s(0)

    assert wait(random.Random(7)) == wait(random.Random(7))
    assert 10 <= wait(random.Random(7)) < wait(Worst()) == pytest.approx(12)


def test_results_of_requests_sent_before_it_opened_do_not_move_it() -> None:
    """Otherwise a burst of slow failures lengthens the cooldown once for each of them, or a late success closes it."""
    breaker = Breaker(PLAIN)
    late = [breaker.acquire(0) for _ in range(6)]
    for _ in range(3):
        end(breaker, Outcome.FAILURE, 0)
    before = breaker.wait_s(0.5)
    for number, permit in enumerate(late):
        assert permit is not None
        breaker.record(permit, Outcome.SUCCESS if number % 2 else Outcome.FAILURE, 0.5, random.Random(0), 30)
    assert breaker.state(0.5) is BreakerState.OPEN
    assert breaker.wait_s(0.5) == before


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.SUCCESS),
        (InvalidRequest("x"), Outcome.SUCCESS),
        (ModelNotFound("x"), Outcome.SUCCESS),
        (Unavailable("x"), Outcome.FAILURE),
        (QueueFull("x"), Outcome.FAILURE),
        (ReplicaLost("x"), Outcome.FAILURE),
        (NoReplica("x"), Outcome.FAILURE),
        (ConfigError("x"), Outcome.NEUTRAL),
        (EngineFault("x"), Outcome.NEUTRAL),
        (GeneratorExit(), Outcome.NEUTRAL),
        (TimeoutError(), Outcome.NEUTRAL),
        (DeadlineExceeded("x"), Outcome.NEUTRAL),
    ],
)
def test_only_unavailable_speaks_against_a_replica(error: BaseException | None, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


@pytest.mark.parametrize(
    "wrong",
    [{"failures": 0}, {"share": 0}, {"share": 1.1}, {"jitter": -1}, {"cooldown_s": 0}, {"cooldown_s": 61},
     {"window_s": 0}, {"min_requests": 0}, {"max_retry_after_s": -1}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        BreakerSettings(**wrong)  # type: ignore[arg-type]


def test_a_permit_cannot_end_twice() -> None:
    breaker = Breaker(PLAIN)
    permit = breaker.acquire(0)
    assert permit is not None
    breaker.record(permit, Outcome.SUCCESS, 0, random.Random(0))
    with pytest.raises(AssertionError):
        breaker.record(permit, Outcome.SUCCESS, 0, random.Random(0))


class Life(RuleBasedStateMachine):
    """Requests come, start and end in any order, while a plain list of what counted says when it must open."""

    SETTINGS = BreakerSettings(failures=3, min_requests=10**6, cooldown_s=1, max_cooldown_s=8, max_retry_after_s=50)

    def __init__(self) -> None:
        super().__init__()
        self.breaker, self.rng, self.now = Breaker(self.SETTINGS), random.Random(1), 0.0
        self.out: list[Permit] = []
        self.failed: list[bool] = []

    def current(self, permit: Permit) -> bool:
        return permit.epoch == self.breaker._epoch

    @rule(pause=st.floats(0, 5))
    def wait(self, pause: float) -> None:
        self.now += pause

    @rule()
    def acquire(self) -> None:
        before, waiting = self.breaker.state(self.now), self.breaker.wait_s(self.now)
        permit = self.breaker.acquire(self.now)
        if permit is None:
            assert before is not BreakerState.CLOSED
        else:
            assert waiting == 0
            assert permit.probe == (before is BreakerState.HALF_OPEN)
            self.out.append(permit)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        permit = data.draw(st.sampled_from(self.out))
        closes = permit.probe and self.current(permit)
        before = self.breaker.state(self.now)
        self.breaker.started(permit, self.now)
        assert self.breaker.state(self.now) is (BreakerState.CLOSED if closes else before)
        if closes:
            self.failed.clear()

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), retry_after_s=st.none() | st.floats(0.1, 100))
    def end(self, data: st.DataObject, outcome: Outcome, retry_after_s: float | None) -> None:
        permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        before, counts, probe = self.breaker.state(self.now), self.current(permit), permit.probe
        self.breaker.record(permit, outcome, self.now, self.rng, retry_after_s)
        after = self.breaker.state(self.now)
        if not counts or outcome is Outcome.NEUTRAL:
            assert after is before
        elif probe:
            assert after is (BreakerState.CLOSED if outcome is Outcome.SUCCESS else BreakerState.OPEN)
            self.failed.clear()
        else:
            self.failed.append(outcome is Outcome.FAILURE)
            told = self.failed[-1] and retry_after_s is not None
            opens = told or (len(self.failed) >= 3 and all(self.failed[-3:]))
            assert after is (BreakerState.OPEN if opens else BreakerState.CLOSED)
            if opens:
                self.failed.clear()

    @invariant()
    def one_probe_at_most(self) -> None:
        probes = [permit for permit in self.out if permit.probe and self.current(permit)]
        assert len(probes) <= 1
        if not probes:  # then nothing but time is between a request and the replica
            assert self.breaker.can_acquire(self.now + self.breaker.wait_s(self.now) + 1e-9)  # floats round

    @invariant()
    def waits_and_memory_are_bounded(self) -> None:
        assert self.breaker.wait_s(self.now) <= 50 * 1.2
        assert self.breaker.cooldown_s <= 8
        assert len(self.breaker._window) <= 11


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
