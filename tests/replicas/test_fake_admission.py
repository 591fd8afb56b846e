"""The fake engine keeps the real one's order, bounds and deadlines, on its own time-table."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from replicas.fake import FakeEngine, FakeSettings
from replicas.protocol import Chunk, DeadlineExceeded, GenerateRequest, QueueFull
from replicas.server import ReplicaServer
from tests.replicas.conftest import Room, eventually

Ask = Callable[..., GenerateRequest]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(engine: FakeEngine, clock: Clock, coming: Iterable[tuple[float, GenerateRequest]]) -> dict[str, float]:
    """Requests at their instants; seconds until the first token of each. The books are checked on the way."""
    arrivals = sorted(coming, key=lambda pair: pair[0], reverse=True)
    came: dict[str, float] = {}
    first: dict[str, float] = {}
    while arrivals or engine.has_work():
        wake = clock.now + engine.wait_s() if engine.has_work() else float("inf")
        if arrivals and arrivals[-1][0] <= wake:
            clock.now = max(clock.now, arrivals[-1][0])
            _, request = arrivals.pop()
            came[request.request_id] = clock.now
            try:
                engine.add(request)
            except QueueFull:
                continue
        else:
            clock.now = wake + 1e-6  # or rounding might leave it a hair before the instant, for ever
        for chunk in engine.step():
            first.setdefault(chunk.request_id, clock.now - came[chunk.request_id])
        if engine.stats().steps % 20 == 0 or not engine.has_work():
            engine.check_integrity()
    return first


def p95(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * (len(seconds) - 1))]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ten_times_its_share_does_not_delay_another_key(ask: Ask, seed: int) -> None:
    """Two keys at their shares of the engine's prefill; then one of them sends ten times as much."""

    def others(flood: float, *, blind: bool = False) -> float:
        clock = Clock()
        settings = FakeSettings(tokens_per_s=50, prefill_tokens_per_s=1000, max_num_seqs=32, max_waiting=60)
        engine = FakeEngine(settings, clock=clock)
        coming = []
        for key, rate in (("flood", 4.5 * flood), ("quiet", 4.5)):
            rng, at = random.Random(f"{seed} {key}"), 100.0
            while (at := at + rng.expovariate(rate)) < 160.0:
                prompt = "".join(chr(rng.randrange(97, 123)) for _ in range(rng.randrange(50, 150)))
                request = ask(prompt, max_tokens=rng.randrange(20, 60), request_id=f"{key} {at}")
                coming.append((at, replace(request, fair_key="" if blind else key)))
        first = run(engine, clock, coming)
        return p95([ttft for name, ttft in first.items() if name.startswith("quiet")])

    before = others(1)
    assert others(10) <= 1.2 * before
    assert others(10, blind=True) > 3 * before, "the flood is none"


def test_a_lower_number_is_served_first(ask: Ask) -> None:
    clock = Clock()
    engine = FakeEngine(FakeSettings(max_num_seqs=1, tokens_per_s=10), clock=clock)
    ranks = (("first", 3), ("background", 5), ("normal", 0), ("urgent", -3))
    asked = [replace(ask(max_tokens=3, request_id=name), priority=rank) for name, rank in ranks]
    first = run(engine, clock, [(100.0 + 0.001 * i, request) for i, request in enumerate(asked)])
    assert sorted(first, key=lambda name: first[name]) == ["first", "urgent", "normal", "background"]


def ended(chunks: list[Chunk]) -> list[str]:
    return [chunk.request_id for chunk in chunks if isinstance(chunk.error, DeadlineExceeded)]


@pytest.mark.parametrize("where", ["waiting", "prefilling", "decoding"])
def test_past_its_deadline_a_request_leaves_in_the_next_step_with_its_blocks(ask: Ask, where: str) -> None:
    clock = Clock()
    seats = 1 if where == "waiting" else 4
    engine = FakeEngine(FakeSettings(tokens_per_s=10, prefill_tokens_per_s=100, max_num_seqs=seats), clock=clock)
    engine.add(ask("hello", max_tokens=80, request_id="other"))
    engine.step()
    clock.now += 0.05
    prompt = "x" * (550 if where == "prefilling" else 1)
    engine.add(replace(ask(prompt, max_tokens=90, request_id="late"), deadline_s=5.97))
    free = engine.stats().kv_blocks_free
    while clock.now + engine.wait_s() < 106.02:
        clock.now += engine.wait_s()
        assert ended(engine.step()) == []
    assert clock.now + engine.wait_s() == pytest.approx(106.02), "it would sleep over the deadline"
    clock.now = 106.03
    assert ended(engine.step()) == ["late"]
    engine.check_integrity()
    assert engine.stats().kv_blocks_free == free
    assert engine.abort("other")
    assert not engine.has_work()


def test_what_cannot_make_it_is_dropped_before_it_costs_anything(ask: Ask) -> None:
    clock = Clock()
    engine = FakeEngine(FakeSettings(tokens_per_s=10, prefill_tokens_per_s=100), clock=clock)
    engine.add(replace(ask("x" * 300, max_tokens=5, request_id="hopeless"), deadline_s=2.9))
    engine.add(replace(ask("y" * 30, max_tokens=9, min_tokens=9, request_id="too long"), deadline_s=1.0))
    engine.add(replace(ask("z" * 30, max_tokens=2, request_id="fine"), deadline_s=1.0))
    chunks = engine.step()
    assert ended(chunks) == ["hopeless", "too long"]
    clock.now += 0.31
    assert [chunk.request_id for chunk in engine.step()] == ["fine"]
    assert engine.stats().prompt_tokens == 30
    assert engine.abort("fine")


def test_a_deadline_that_has_passed_is_refused_and_leaves_no_trace(ask: Ask) -> None:
    engine = FakeEngine()
    for deadline_s in (0.0, -1.0, float("nan")):
        with pytest.raises(DeadlineExceeded):
            engine.add(replace(ask(), deadline_s=deadline_s))
    assert not engine.has_work()


def test_a_key_that_floods_is_refused_while_others_get_in(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(max_waiting=10))
    for _ in range(8):
        engine.add(replace(ask(), fair_key="flood"))
    with pytest.raises(QueueFull, match="of this key") as full:
        engine.add(replace(ask(), fair_key="flood"))
    assert full.value.retry_after_s
    engine.add(replace(ask(), fair_key="other"))


async def test_deadline_key_and_bounds_cross_the_wire(room: Room, ask: Ask) -> None:
    server: ReplicaServer = room.replica(tokens_per_s=20, max_num_seqs=1, max_waiting=10)
    connection = await room.connect(server)
    with pytest.raises(DeadlineExceeded):
        async for _ in connection.generate(replace(ask(max_tokens=1000), deadline_s=0.2)):
            pass
    first = connection.generate(ask(max_tokens=1000))
    await anext(first)
    second = connection.generate(replace(ask(max_tokens=1), fair_key="k"))
    waiting = asyncio.create_task(anext(second))  # type: ignore[arg-type]
    await eventually(lambda: connection.in_flight == 2)
    with pytest.raises(QueueFull) as full:
        async for _ in connection.generate(replace(ask(), fair_key="k", max_queued_per_key=1)):
            pass
    assert full.value.retry_after_s
    await first.aclose()
    await waiting
    await second.aclose()
