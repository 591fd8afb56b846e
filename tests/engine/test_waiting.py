from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.waiting import Account, LineLimits, WaitingLine
from replicas.protocol import ConfigError, GenerateRequest, QueueFull, SamplingParams


@dataclass(eq=False)
class Item:
    name: str = ""
    key: str = ""
    account: Account = field(default_factory=Account)


def request(key: str = "", priority: int = 0, **bounds: int) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=SamplingParams(),
        fair_key=key,
        priority=priority,
        max_queued=bounds.get("max_queued"),
        max_queued_per_key=bounds.get("max_queued_per_key"),
    )


def line(**limits: float | None) -> WaitingLine[Item]:
    return WaitingLine(LineLimits(**limits))  # type: ignore[arg-type]


def join(waiting: WaitingLine[Item], key: str = "", *, now: float = 0.0, priority: int = 0, tokens: int = 1) -> Item:
    item = Item(key=key)
    waiting.check(request(key, priority), now)
    waiting.add(item, request(key, priority), tokens, now)
    return item


def serve(waiting: WaitingLine[Item], now: float = 0.0, cost: float = 1.0) -> Item:
    item = waiting.head(now)
    assert item is not None, "nobody waits"
    waiting.take(item, now)
    item.account.cost += cost
    item.account.seats -= 1
    return item


def test_without_keys_the_line_is_first_come_first_served() -> None:
    waiting = line()
    items = [join(waiting) for _ in range(5)]
    assert [serve(waiting) for _ in items] == items
    assert waiting.head(0.0) is None


def test_keys_take_turns_however_many_each_has_waiting() -> None:
    waiting = line()
    for key, count in (("flood", 6), ("a", 2), ("b", 2)):
        for _ in range(count):
            join(waiting, key)
    assert sorted(serve(waiting).key for _ in range(3)) == ["a", "b", "flood"]
    assert sorted(serve(waiting).key for _ in range(3)) == ["a", "b", "flood"]
    assert [serve(waiting).key for _ in range(4)] == ["flood"] * 4


def test_a_turn_is_measured_by_cost_not_by_requests() -> None:
    waiting = line()
    for _ in range(20):
        join(waiting, "large")
        join(waiting, "small")
    served = []
    for _ in range(11):
        item = waiting.head(0.0)
        assert item is not None
        served.append(serve(waiting, cost=10 if item.key == "large" else 1).key)
    assert served.count("large") <= 2


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("join"), st.sampled_from("abcd"), st.integers(0, 2)),
            st.tuples(st.just("serve"), st.integers(0, 50), st.just(0)),
            st.tuples(st.just("leave"), st.integers(0, 30), st.just(0)),
        ),
        max_size=80,
    )
)
def test_everybody_leaves_once_and_each_key_in_its_own_order(commands: list[tuple[str, object, int]]) -> None:
    waiting = line()
    inside: list[Item] = []
    now = 0.0
    for what, value, priority in commands:
        now += 0.3
        if what == "join":
            inside.append(join(waiting, str(value), now=now, priority=priority, tokens=3))
        elif what == "serve" and inside:
            item = serve(waiting, now, float(str(value)))
            mine = [i for i in inside if i.account is item.account]
            assert mine[0] is item, "somebody of the same key and priority came earlier"
            inside.remove(item)
        elif what == "leave" and inside:
            gone = inside.pop(int(str(value)) % len(inside))
            assert waiting.remove(gone)
            assert not waiting.remove(gone)
        assert len(waiting) == len(inside)
        assert waiting.tokens == 3 * len(inside)
        assert set(waiting) == set(inside)
        assert (waiting.head(now) is None) == (not inside), "somebody waits and nobody is next"


@settings(max_examples=50)
@given(st.integers(), st.lists(st.integers(1, 100), min_size=2, max_size=5))
def test_keys_that_always_wait_never_drift_apart_by_more_than_one_request(seed: int, largest: list[int]) -> None:
    """The bound of VTC for one request at a time: the service of any two differs by less than the largest costs."""
    rng, waiting = random.Random(seed), line()
    keys = [f"k{i}" for i in range(len(largest))]
    for key in keys:
        for _ in range(3):
            join(waiting, key)
    served = dict.fromkeys(keys, 0.0)
    for turn in range(300):
        head = waiting.head(turn)
        assert head is not None
        cost = rng.randint(1, largest[keys.index(head.key)])
        item = serve(waiting, turn, cost)
        served[item.key] += cost
        join(waiting, item.key, now=turn)
        assert max(served.values()) - min(served.values()) <= max(largest)


def test_a_key_that_was_away_is_owed_a_minute_at_most() -> None:
    waiting = line()
    for now in range(600):
        join(waiting, "steady", now=now)
        serve(waiting, now)
    for _ in range(200):
        join(waiting, "back", now=600)
        join(waiting, "steady", now=600)
    order = [serve(waiting, 600).key for _ in range(200)]
    assert order[:50] == ["back"] * 50
    assert order[70:].count("steady") >= 60


def test_a_lower_number_goes_first_and_a_minute_makes_up_for_a_rank() -> None:
    waiting = line()
    low = join(waiting, "a", priority=1, now=0.0)
    high = join(waiting, "b", priority=0, now=30.0)
    assert waiting.head(40.0) is high
    late = line()
    low = join(late, "a", priority=1, now=0.0)
    join(late, "b", priority=0, now=61.0)
    assert late.head(62.0) is low
    strict = line(priority_aging_s=None)
    join(strict, "a", priority=1, now=0.0)
    high = join(strict, "b", priority=0, now=1e6)
    assert strict.head(1e6) is high


def test_no_class_starves_under_an_overload_of_a_higher_one() -> None:
    waiting = line(priority_aging_s=10.0)
    low = join(waiting, "low", priority=5)
    served_at = None
    for now in range(200):
        join(waiting, "high", now=now)
        join(waiting, "high", now=now)
        if serve(waiting, now) is low:
            served_at = now
            break
    assert served_at is not None


def test_one_that_floods_is_refused_while_others_still_get_in() -> None:
    waiting = line(max_waiting=100)
    for _ in range(80):
        join(waiting, "flood")
    with pytest.raises(QueueFull, match="of this key"):
        join(waiting, "flood")
    join(waiting, "somebody else")
    with pytest.raises(QueueFull):
        join(waiting, "flood")
    for i in range(19):
        join(waiting, f"other {i}")
    with pytest.raises(QueueFull, match="100 requests"):
        join(waiting, "one more")


def test_requests_without_a_key_may_fill_the_line() -> None:
    waiting = line(max_waiting=10)
    for _ in range(10):
        join(waiting)
    with pytest.raises(QueueFull, match="10 requests"):
        join(waiting)


def test_bounds_come_from_the_settings_and_from_the_request() -> None:
    waiting = line(max_waiting=10, max_waiting_per_key=2)
    join(waiting, "a")
    join(waiting, "a")
    with pytest.raises(QueueFull):
        join(waiting, "a")
    waiting.check(request("a", max_queued_per_key=3), 0.0)
    with pytest.raises(QueueFull):
        waiting.check(request("b", max_queued=2), 0.0)
    for i in range(8):
        join(waiting, f"o{i}")
    with pytest.raises(QueueFull):
        waiting.check(request("b", max_queued=1000), 0.0)


def test_waiting_tokens_are_bounded_but_one_request_always_fits() -> None:
    waiting = line(max_waiting_tokens=100)
    join(waiting, "a", tokens=5000)
    assert waiting.full()
    with pytest.raises(QueueFull, match="5000 prompt tokens"):
        join(waiting, "b", tokens=1)
    serve(waiting)
    join(waiting, "b", tokens=1)


def test_who_waits_as_long_as_told_gets_in() -> None:
    """Twenty clients refused at once, by a line that moves at a steady pace: each finds a place at its hour."""
    waiting = line(max_waiting=50)
    now = 0.0
    for i in range(40):  # so that its pace is known: four a second
        now += 0.25
        join(waiting, f"k{i % 10}", now=now)
        join(waiting, f"k{i % 10}", now=now)
        serve(waiting, now)
    while len(waiting) < 50:
        join(waiting, f"f{len(waiting)}", now=now)
    hours: list[tuple[float, str]] = []
    for i in range(20):
        with pytest.raises(QueueFull) as full:
            join(waiting, f"k{i % 10}", now=now)
        assert full.value.retry_after_s is not None
        hours.append((now + full.value.retry_after_s, f"k{i % 10}"))
    start = now
    for hour, key in sorted(hours):
        while now + 0.25 <= hour:
            now += 0.25
            serve(waiting, now)
        join(waiting, key, now=hour)
    assert now - start < 50 / 4 + 1, "nobody is sent away for longer than the line takes"


def test_keys_that_never_come_back_are_forgotten() -> None:
    waiting = line()
    for i in range(20_000):
        join(waiting, f"once {i}", now=i)
        serve(waiting, i, cost=100.0)
    assert len(waiting._accounts) < 5000
    assert len(waiting._recent) <= 62


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_waiting", 0),
        ("max_waiting_tokens", 0),
        ("max_waiting_per_key", -1),
        ("priority_aging_s", 0.0),
        ("fair_reserve", 1.0),
        ("fair_reserve", float("nan")),
    ],
)
def test_impossible_limits_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        line(**{name: value})


@given(st.floats(0, 0.99), st.integers(1, 300))
def test_a_reserve_is_never_everything(share: float, count: int) -> None:
    assert 0 <= LineLimits(fair_reserve=share).reserved(count) < count
