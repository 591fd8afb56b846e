from __future__ import annotations

import random

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policies.sim_cache import BlockCache
from policies.sim_replica import ReplicaModel, SimReplica, SimSequence
from replicas.engine.blocks import BlockPool
from replicas.engine.scheduler import Scheduler
from replicas.engine.sequence import Sequence
from replicas.protocol import GenerateRequest, KVEvent, SamplingParams, block_hash, prefix_root

ROOT = prefix_root("", "w")
SIZE = 4


def hashes_of(tokens: list[int]) -> tuple[bytes, ...]:
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        hashes.append(block_hash(hashes[-1] if hashes else ROOT, tokens[start : start + SIZE]))
    return tuple(hashes)


def sequence(number: int, tokens: list[int], output: int) -> SimSequence:
    return SimSequence(number, len(tokens), output, hashes_of(tokens), ROOT)


def engine_run(
    model: ReplicaModel, arrivals: list[tuple[int, list[int], int]]
) -> tuple[list[tuple[int, int, int]], int, int]:
    """The real scheduler and pool: for each request (tokens found cached, step of its first token, step of its end)."""
    pool = BlockPool(model.num_blocks, SIZE)
    scheduler = Scheduler(
        pool,
        max_num_seqs=model.max_num_seqs,
        max_num_batched_tokens=model.max_num_batched_tokens,
        watermark=model.watermark,
    )
    coming = list(enumerate(arrivals))
    told: dict[int, tuple[int, int, int]] = {}
    first: dict[int, int] = {}
    fresh = 10**6  # every sampled token is one that no prompt has
    step = computed = 0
    while coming or scheduler.waiting or scheduler.running:
        while coming and coming[0][1][0] <= step:
            number, (_, tokens, output) = coming.pop(0)
            params = SamplingParams(max_tokens=output)
            request = GenerateRequest(request_id=str(number), prompt_token_ids=tuple(tokens), sampling=params)
            scheduler.add(Sequence(str(number), 0, tokens.copy(), len(tokens), params, 0, ROOT), request)
        items = scheduler.schedule().items
        step += 1
        for seq, count in items:
            computed += count
            seq.num_computed += count
            if seq.num_computed == seq.num_tokens:
                fresh += 1
                seq.tokens.append(fresh)
                first.setdefault(int(seq.request_id), step)
                if seq.num_output == seq.sampling.max_tokens:
                    scheduler.drop(seq)
                    number = int(seq.request_id)
                    told[number] = (seq.num_cached, first[number], step)
    return [told[number] for number in range(len(arrivals))], scheduler.num_preemptions, computed


def simulated_run(
    model: ReplicaModel, arrivals: list[tuple[int, list[int], int]]
) -> tuple[list[tuple[int, int, int]], int, SimReplica]:
    replica = SimReplica(model)
    coming = [(at, sequence(number, tokens, output)) for number, (at, tokens, output) in enumerate(arrivals)]
    every = [seq for _, seq in coming]
    first: dict[int, int] = {}
    ends: dict[int, int] = {}
    idle = 0  # steps that passed with nothing to do
    while coming or replica.has_work():
        while coming and coming[0][0] <= replica.steps + idle:
            replica.add(coming.pop(0)[1])
        if not replica.has_work():
            idle += 1
            continue
        seconds = replica.begin()
        if coming:  # a step boundary at which somebody arrives ends a stretch
            steps = max(1, coming[0][0] - replica.steps - idle)
            one = replica.model.step_s
            seconds = replica.cut(one * steps - one / 2)
        assert seconds > 0
        result = replica.finish()
        replica.check_integrity()
        for seq in result.first:
            first[seq.number] = replica.steps + idle
        for seq in result.done:
            ends[seq.number] = replica.steps + idle
    return [(seq.cached, first[seq.number], ends[seq.number]) for seq in every], replica.num_preemptions, replica


def workload(rng: random.Random, count: int, longest: int) -> list[tuple[int, list[int], int]]:
    """Prompts that share beginnings, arriving over time: (step, tokens, output)."""
    at, arrivals = 0, []
    stems = [[100 * stem + n for n in range(24)] for stem in range(4)]
    for number in range(count):
        at += rng.randrange(4)
        stem = rng.choice(stems)[: rng.randrange(25)]
        own = [10_000 + 100 * number + n for n in range(rng.randrange(1, longest))]
        arrivals.append((at, stem + own, rng.randrange(1, 12)))
    return arrivals


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.integers(40, 120), st.integers(8, 64), st.integers(2, 12))
def test_it_does_step_for_step_what_the_engines_scheduler_does(seed: int, blocks: int, budget: int, seqs: int) -> None:
    """Hits, first tokens and ends, where the pool is large enough that nobody is preempted."""
    model = ReplicaModel(
        num_blocks=blocks,
        block_size=SIZE,
        max_num_batched_tokens=max(budget, seqs),
        max_num_seqs=seqs,
        watermark=0.05,
        decode_s=0.0,
        prefill_rate=1e12,
        step_s=1.0,
    )
    arrivals = workload(random.Random(seed), 25, 20)
    expected, preempted, computed = engine_run(model, arrivals)
    assume(not preempted)  # recomputed outputs may hit the engine's cache, which the simulator does not follow
    found, _, replica = simulated_run(model, arrivals)
    assert found == expected
    assert replica.computed_tokens + replica.generation_tokens - len(arrivals) == computed


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.integers(12, 20))
def test_preempted_requests_all_end_and_every_block_comes_back(seed: int, blocks: int) -> None:
    model = ReplicaModel(num_blocks=blocks, block_size=SIZE, max_num_batched_tokens=32, max_num_seqs=8, watermark=0.0)
    arrivals = [(0, tokens[:20], 25) for _, tokens, _ in workload(random.Random(seed), 12, 20)]
    found, preempted, replica = simulated_run(model, arrivals)
    assert len(found) == 12
    assert preempted > 0
    assert replica.cache.num_free == blocks
    assert replica.generation_tokens >= sum(output for _, _, output in arrivals)
    stats = replica.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.queued_tokens) == (0, 0, 0)


def test_of_one_prefix_the_tail_is_evicted_first() -> None:
    cache, hashes = BlockCache(4), hashes_of(list(range(16)))
    blocks = cache.allocate(4)
    cache.store(blocks, hashes, 0, 4, ROOT)
    cache.release(blocks)
    held = cache.allocate(2)
    assert cache.leading(hashes) == 2
    cache.release(held)
    assert cache.take_events() == [
        KVEvent(kind="stored", hashes=hashes, parent=ROOT),
        KVEvent(kind="removed", hashes=(hashes[3], hashes[2])),
    ]
    cache.check_integrity([])


def test_a_held_block_is_never_evicted() -> None:
    cache, hashes = BlockCache(4), hashes_of(list(range(8)))
    blocks = cache.allocate(2)
    cache.store(blocks, hashes, 0, 2, ROOT)
    others = cache.allocate(2)
    assert cache.num_free == 0
    cache.release(others)
    cache.acquire(hashes)
    cache.release(blocks)
    cache.release(cache.allocate(2))
    assert cache.leading(hashes) == 2


def test_a_stretch_of_decodes_is_one_step_and_an_arrival_cuts_it_at_the_next_boundary() -> None:
    replica = SimReplica(ReplicaModel(step_s=1.0, decode_s=0.0, prefill_rate=1e9))
    replica.add(sequence(0, [1, 2, 3], 11))
    replica.begin()
    replica.finish()
    assert replica.begin() == 10.0
    assert replica.cut(3.2) == 4.0
    replica.finish()
    assert replica.steps == 5
    assert replica.begin() == 6.0
    assert [seq.number for seq in replica.finish().done] == [0]
    assert replica.stats().decode_step_s == 1.0
