"""The real scheduler and block pool in virtual time: what keys do to each other, and what deadlines do to requests."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replicas.engine.bench_fairness import Seen, Traffic, World, capacity
from replicas.engine.blocks import BlockPool
from replicas.engine.pace import Pace
from replicas.engine.scheduler import Scheduler, Step
from replicas.engine.sequence import Sequence
from replicas.engine.waiting import LineLimits
from replicas.protocol import DeadlineExceeded, GenerateRequest, QueueFull, SamplingParams

SIZE = 4


class Bench:
    """A scheduler, its clock, and every sequence it was given; a step takes a second."""

    def __init__(self, *, seqs: int = 4, blocks: int = 200, budget: int = 16, watermark: float = 0.0, **limits: float):
        self.pool = BlockPool(blocks, SIZE)
        self.now = 0.0
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            watermark=watermark,
            limits=LineLimits(**limits),  # type: ignore[arg-type]
            clock=lambda: self.now,
        )
        self.alive: dict[str, Sequence] = {}
        self.done: list[str] = []
        self.late: list[str] = []
        self._numbers = iter(range(10**9))

    def add(
        self, key: str = "", *, prompt: int = 4, output: int = 1, priority: int = 0, deadline_s: float | None = None
    ) -> str:
        name = f"{key}-{next(self._numbers)}"
        tokens = [hash((name, i)) % 10**9 for i in range(prompt)]
        sampling = SamplingParams(max_tokens=output)
        request = GenerateRequest(
            request_id=name,
            prompt_token_ids=tuple(tokens),
            sampling=sampling,
            fair_key=key,
            priority=priority,
            deadline_s=deadline_s,
        )
        self.scheduler.check(request)
        seq = Sequence(name, 0, tokens, prompt, sampling, 0, b"root")
        seq.queued_tokens = prompt
        self.scheduler.add(seq, request)
        self.alive[name] = seq
        return name

    def step(self) -> Step:
        self._end(self.scheduler.take_late())
        step = self.scheduler.schedule()
        self._end([seq.request_id for seq in step.hopeless])
        self.now += 1.0
        for seq, count in step.items:
            seq.num_computed += count
            if seq.num_computed == seq.num_tokens:
                seq.tokens.append(0)
                if seq.num_output == seq.sampling.max_tokens:
                    self.scheduler.deadlines.discard(seq.request_id)
                    self.scheduler.drop(self.alive.pop(seq.request_id))
                    self.done.append(seq.request_id)
        self.check_integrity()
        return step

    def _end(self, late: list[str]) -> None:
        for name in late:
            self.scheduler.deadlines.discard(name)
            self.scheduler.drop(self.alive.pop(name))
            self.late.append(name)

    def running(self) -> list[str]:
        return [seq.request_id for seq in self.scheduler.running]

    def check_integrity(self) -> None:
        self.pool.check_integrity([seq.blocks for seq in self.alive.values()])
        waiting, running = set(self.scheduler.waiting), set(self.scheduler.running)
        assert not waiting & running
        assert waiting | running == set(self.alive.values())
        seats: dict[int, int] = {}
        for seq in running:
            seats[id(seq.account)] = seats.get(id(seq.account), 0) + 1
        assert all(seq.account.seats == seats.get(id(seq.account), 0) for seq in self.alive.values())


# ---------------------------------------------------------------- one key's flood


def p95_of_the_others(traffic: dict[str, Traffic], seed: int, *, seqs: int, blind: bool = False) -> float:
    seen = World(max_num_seqs=seqs).run(traffic, 400, seed, blind=blind)
    return Seen([ttft for key, one in seen.items() if key != "key-0" for ttft in one.ttft_s]).p95()


@pytest.mark.parametrize(
    ("keys", "seqs", "load"), [(2, 32, 0.5), (8, 32, 0.5), (8, 32, 0.7), (4, 8, 0.7), (4, 16, 0.9), (2, 8, 0.95)]
)
def test_ten_times_its_share_does_not_delay_the_other_keys(keys: int, seqs: int, load: float) -> None:
    """All keys at their shares of a part of the engine; then one of them sends ten times as much."""
    share = load * capacity(Traffic(per_s=1), seqs) / keys
    calm = {f"key-{i}": Traffic(per_s=share) for i in range(keys)}
    flood = {**calm, "key-0": Traffic(per_s=10 * share)}
    before = p95_of_the_others(calm, 1, seqs=seqs)
    assert p95_of_the_others(flood, 1, seqs=seqs) <= 1.2 * before
    assert p95_of_the_others(flood, 1, seqs=seqs, blind=True) > 4 * before, "the flood is none"


def test_alone_a_flood_loses_nothing_to_courtesy() -> None:
    flood = {"flood": Traffic(per_s=10 * capacity(Traffic(per_s=1), 16))}
    told, blind = World(max_num_seqs=16), World(max_num_seqs=16)
    tokens = [world.run(flood, 60, 1, blind=world is blind)["flood"].tokens / world.busy_s for world in (told, blind)]
    assert tokens[0] >= 0.99 * tokens[1]


def test_what_others_leave_goes_to_the_flood() -> None:
    share = capacity(Traffic(per_s=1), 16) / 4
    seen = World(max_num_seqs=16).run(
        {"flood": Traffic(per_s=10 * share), "quiet": Traffic(per_s=share / 10)}, 300, seed=1
    )
    assert seen["flood"].tokens > 20 * seen["quiet"].tokens
    assert seen["flood"].refused > 0
    assert seen["quiet"].refused == 0


def test_a_newcomer_finds_a_seat_although_one_key_could_take_all() -> None:
    bench = Bench(seqs=8, budget=64)
    bench.add("quiet")
    bench.step()
    for _ in range(20):
        bench.add("flood", output=1000)
    bench.step()
    assert len(bench.running()) == 7, "one seat in eight is kept while another key was heard of lately"
    name = bench.add("quiet", output=2)
    bench.step()
    assert name in bench.running()


def test_one_key_alone_gets_every_seat() -> None:
    bench = Bench(seqs=8, budget=64)
    for _ in range(20):
        bench.add("only", output=1000)
    bench.step()
    assert len(bench.running()) == 8


def test_at_a_full_engine_the_key_with_the_most_seats_makes_way() -> None:
    bench = Bench(seqs=4, budget=64)
    flood = [bench.add("flood", output=1000) for _ in range(6)]
    bench.step()
    assert bench.running() == flood[:4]
    name = bench.add("quiet", output=3)
    bench.step()
    assert bench.running() == [*flood[:3], name]
    for _ in range(4):
        bench.step()
    assert bench.done == [name]
    assert flood[3] in bench.running() or bench.scheduler.waiting.head(bench.now) is bench.alive[flood[3]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(),
    seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    blocks=st.integers(14, 60),
    reserve=st.sampled_from([0.0, 0.125, 0.5]),
    slow=st.floats(0, 0.3),
)
@example(seed=65409, seqs=2, budget=20, blocks=14, reserve=0.0, slow=0.0)  # a flood's own victim ended the whole step
def test_everybody_ends_whatever_the_keys_priorities_and_sizes(
    seed: int, seqs: int, budget: int, blocks: int, reserve: float, slow: float
) -> None:
    rng = random.Random(seed)
    bench = Bench(seqs=seqs, budget=budget, blocks=blocks, watermark=0.05, fair_reserve=reserve)
    added = 0
    for turn in range(20_000):
        while added < 30 and rng.random() < 0.3:
            added += 1
            deadline = rng.choice([None, None, None, rng.uniform(1, 60)])
            sizes = {"prompt": rng.randint(1, 30), "output": rng.randint(1, 12)}
            bench.add(rng.choice(["a", "b", "b", "b", ""]), priority=rng.randint(0, 2), deadline_s=deadline, **sizes)
        if added == 30 and not bench.alive:
            break
        step = bench.step()
        assert step.items or not bench.alive, f"nothing was computed in step {turn} although somebody waits"
        bench.scheduler.record(0.1 + slow * len(step.items), step)
    assert not bench.alive
    assert len(bench.done) + len(bench.late) == 30
    assert bench.pool.num_free == bench.pool.num_blocks
    assert len(bench.scheduler.deadlines) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(), st.integers(2, 4), st.integers(1, 6))
def test_keys_that_always_wait_get_the_same(seed: int, keys: int, seqs: int) -> None:
    """The bound of VTC: twice what all that run at once can cost, however different the requests are."""
    rng = random.Random(seed)
    bench = Bench(seqs=seqs, budget=32, blocks=300)
    served = dict.fromkeys((f"k{i}" for i in range(keys)), 0.0)
    largest = {key: (rng.randint(1, 30), rng.randint(1, 12)) for key in served}
    for _ in range(150):
        names = [seq.account.key for seq in bench.scheduler.waiting]
        for key, (prompt, output) in largest.items():
            for _ in range(seqs + 1 - names.count(key)):
                bench.add(key, prompt=rng.randint(1, prompt), output=rng.randint(1, output))
        before = [(seq, seq.admitted, seq.num_output) for seq in bench.alive.values()]
        bench.step()
        for seq, admitted, outputs in before:
            prompt = seq.num_prompt if seq.admitted and not admitted else 0
            served[seq.account.key] += prompt + 2 * (seq.num_output - outputs)
        cost = max(prompt + 2 * output for prompt, output in largest.values())
        assert max(served.values()) - min(served.values()) <= 2 * (seqs + 1) * cost


# ---------------------------------------------------------------- deadlines


def test_a_request_past_its_deadline_leaves_within_one_step_wherever_it_is() -> None:
    bench = Bench(seqs=3, budget=8)
    decoding = bench.add("a", prompt=4, output=1000, deadline_s=5.0)
    while bench.now < 3:
        bench.step()
    prefilling = bench.add("b", prompt=60, output=5, deadline_s=2.0)
    bench.step()
    waiting = bench.add("c", prompt=60, output=5, deadline_s=1.0)
    while bench.alive:
        due = {name for name in bench.alive if bench.now >= (bench.scheduler.deadlines.get(name) or 1e9)}
        bench.step()
        assert not due & set(bench.alive), "somebody outstayed a step"
    assert sorted(bench.late) == sorted([decoding, prefilling, waiting])
    assert bench.done == []
    assert bench.pool.num_free == bench.pool.num_blocks


def test_a_request_that_cannot_make_it_any_more_costs_nothing() -> None:
    bench = Bench(seqs=1, budget=8)
    bench.add("a", prompt=4, output=30)
    for _ in range(10):
        bench.scheduler.record(1.0, bench.step())
    hopeless = bench.add("b", prompt=40, deadline_s=23.0)  # its five steps take 5 s, and it waits for 20
    hopeful = bench.add("c", prompt=16, deadline_s=23.5)
    while bench.alive:
        computed = [seq.request_id for seq, _ in bench.step().items]
        assert hopeless not in computed
    assert bench.late == [hopeless]
    assert hopeful in bench.done


def test_what_is_cached_takes_no_time() -> None:
    """A prompt that looked hopeless when it came is computed if another has brought it into the cache meanwhile."""
    bench = Bench(seqs=2, budget=8)
    prompt = list(range(40))
    for name, deadline_s in (("first", None), ("second", 3.5)):
        request = GenerateRequest(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=8),
            deadline_s=deadline_s,
        )
        seq = Sequence(name, 0, prompt.copy(), 40, request.sampling, 0, b"root")
        seq.queued_tokens = 40
        bench.alive[name] = seq
        bench.scheduler.add(seq, request)
        while name == "first" and bench.now < 9:
            bench.scheduler.record(1.0, bench.step())
    while bench.alive:
        bench.step()
    assert bench.done == ["first"]
    assert bench.late == ["second"]
    assert seq.num_output >= 1, "it was computed, until its time was over"


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
def test_a_deadline_that_has_passed_already_is_refused_at_once(deadline_s: float) -> None:
    bench = Bench()
    with pytest.raises(DeadlineExceeded):
        bench.add("a", deadline_s=deadline_s)
    assert not bench.alive


def test_a_refused_request_leaves_no_deadline() -> None:
    bench = Bench(max_waiting=1)
    bench.add("a", deadline_s=50)
    with pytest.raises(QueueFull):
        bench.add("a", deadline_s=5)
    assert len(bench.scheduler.deadlines) == 1


# ---------------------------------------------------------------- what seats cost


@pytest.mark.parametrize(
    ("base", "each", "expected"), [(0.006, 0.004, 2), (0.006, 0.001, 6), (0.02, 1e-7, 64), (0.02, 0.0, 64)]
)
def test_seats_pay_where_steps_hardly_grow(base: float, each: float, expected: int) -> None:
    pace, rng = Pace(), random.Random(1)
    assert pace.seats_that_pay(0.5, 64) == 64, "nothing is known yet"
    for _ in range(100):
        count = rng.randint(1, 32)
        pace.record((base + each * count) * rng.uniform(0.99, 1.01), count, 0, 256)
    assert abs(pace.seats_that_pay(0.5, 64) - expected) <= 1 + (expected == 64) * 40


def test_steps_of_one_size_tell_nothing() -> None:
    pace = Pace()
    for _ in range(100):
        pace.record(0.1, 16, 0, 256)
    assert pace.seats_that_pay(0.5, 64) == 64


def test_the_least_time_is_that_of_the_fastest_steps() -> None:
    pace = Pace()
    assert pace.least_s(1000, 10, 256) == 0.0
    pace.record(0.5, 4, 256, 256)
    pace.record(0.01, 4, 0, 256)
    assert pace.least_s(1024, 1, 256) == pytest.approx(2.0)
    assert pace.least_s(10, 101, 256) == pytest.approx(1.0 + 10 * 0.5 / 256, abs=0.02)
