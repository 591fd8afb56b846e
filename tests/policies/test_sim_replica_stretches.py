"""What is skipped changes nothing: stretches of decode steps against every step by itself."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.sim_fleet import Autoscale, Fleet, Outage
from policies.sim_replica import ReplicaModel
from policies.simulator import prepare, simulate
from policies.traces import TraceRequest


def traffic(seed: int, count: int, rate: float) -> list[TraceRequest]:
    rng = random.Random(seed)
    at, found = 0.0, []
    for number in range(count):
        at += rng.expovariate(rate)
        blocks = rng.randrange(1, 12)
        shared = tuple(range(rng.randrange(blocks + 1)))
        own = tuple(1000 * (number + 1) + n for n in range(blocks - len(shared)))
        found.append(TraceRequest(at, blocks * 16 + 3, rng.randrange(1, 90), (*shared, *own, 7), 16))
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(), st.sampled_from([24, 40, 400]), st.booleans(), st.integers(1, 3))
def test_every_request_ends_when_it_does_step_by_step(seed: int, blocks: int, grows: bool, replicas: int) -> None:
    """With few blocks sequences are preempted and prefixes evicted; with `grows` steps lengthen with their contexts."""
    model = ReplicaModel(num_blocks=blocks, context_s=2e-6 if grows else 0.0, floor_s=0.01, max_num_seqs=6)
    fleet = Fleet(replicas=replicas, model=model)
    requests = prepare(traffic(seed, 40, 4.0 * replicas))
    fast, slow = (
        simulate(requests, "round_robin", replace(fleet, model=replace(model, one_by_one=each))).outcomes
        for each in (False, True)
    )
    assert fast.column("ends").tolist() == slow.column("ends").tolist()
    assert fast.column("cached_tokens").tolist() == slow.column("cached_tokens").tolist()
    for name in ("ttft_s", "e2e_s"):
        assert np.allclose(fast.column(name), slow.column(name), rtol=1e-9, atol=1e-9, equal_nan=True)


def test_where_gateways_read_caches_the_figures_stay_close() -> None:
    """Evictions inside a stretch are told at its end, so a gateway may learn of them some steps later."""
    fleet = Fleet(replicas=4, gateways=2, model=ReplicaModel(num_blocks=200))
    requests = prepare(traffic(5, 1200, 9.0))
    fast, slow = (
        simulate(requests, "affinity", replace(fleet, model=replace(fleet.model, one_by_one=each)))
        for each in (False, True)
    )
    assert fast.hit_rate == pytest.approx(slow.hit_rate, abs=0.01)
    for percentile in (50, 95):
        assert fast.ttft(percentile) == pytest.approx(slow.ttft(percentile), rel=0.08)


def test_a_replica_that_dies_takes_no_request_along_that_had_no_token_yet() -> None:
    fleet = Fleet(replicas=2, outages=(Outage(replica=0, at_s=6.0, down_s=4.0),))
    result = simulate(prepare(traffic(1, 60, 5.0)), "least_load", fleet)
    assert result.completed + result.cut == 60
    assert result.unavailable == 0
    assert result.cut > 0
    assert min(share.requests for share in result.replicas) > 5  # it came back
    assert result.replicas[0].up_s == pytest.approx(result.replicas[1].up_s - 4.0, abs=0.01)


def test_without_any_replica_requests_wait_and_then_are_refused() -> None:
    fleet = Fleet(replicas=1, outages=(Outage(replica=0, at_s=2.0),), wait_s=3.0)
    result = simulate(prepare(traffic(1, 20, 2.0)), "affinity", fleet)
    assert result.unavailable > 5
    assert result.completed + result.unavailable + result.cut == 20


def test_replicas_follow_the_load_up_and_down_again() -> None:
    scale = Autoscale(least=1, most=4, target=2.0, look_s=0.5, start_s=2.0, down_after_s=3.0)
    busy = traffic(2, 120, 4.0)
    quiet = [replace(one, arrival_s=busy[-1].arrival_s + 30 + 5 * n) for n, one in enumerate(traffic(3, 12, 1.0))]
    alone = simulate(prepare(busy + quiet), "least_load", Fleet(replicas=1))
    scaled = simulate(prepare(busy + quiet), "least_load", Fleet(replicas=1, autoscale=scale))
    assert scaled.completed == 132
    assert len(scaled.replicas) > 2
    assert scaled.ttft(95) < 0.5 * alone.ttft(95)
    assert sum(share.up_s for share in scaled.replicas) < 0.8 * 4 * scaled.duration_s


def test_a_full_queue_is_tried_elsewhere_and_then_refused() -> None:
    model = ReplicaModel(max_waiting=1, max_num_seqs=1)
    crowd = [replace(one, arrival_s=0.0) for one in traffic(4, 12, 1.0)]
    result = simulate(prepare(crowd), "round_robin", Fleet(replicas=2, model=model))
    assert 2 <= result.completed <= 6
    assert result.completed + result.unavailable == 12
