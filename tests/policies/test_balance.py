from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.balance import ReplicaLoad, least_load
from replicas.protocol import EngineStats, NoReplica


def load(name: str, running: int = 0, waiting: int = 0, queued: int = 0, *, unreported: int = 0) -> ReplicaLoad:
    stats = EngineStats(num_requests_running=running, num_requests_waiting=waiting, queued_tokens=queued)
    return ReplicaLoad(name, stats, unreported)


def test_the_replica_with_fewest_requests_wins() -> None:
    choice = least_load([load("a", running=3), load("b", running=1, waiting=1), load("c", waiting=4)], random.Random(0))
    assert choice.index == 1
    assert choice.terms == ((3, 0), (2, 0), (4, 0))


def test_among_equals_the_shorter_prompt_queue_wins() -> None:
    assert least_load([load("a", 2, queued=900), load("b", 2, queued=10)], random.Random(0)).index == 1


def test_a_replica_that_has_not_reported_yet_counts_what_was_sent_to_it() -> None:
    assert least_load([ReplicaLoad("new", None, unreported=2), load("b", running=1)], random.Random(0)).index == 1


def test_no_candidate_is_no_replica() -> None:
    with pytest.raises(NoReplica):
        least_load([], random.Random(0))


def test_ties_are_broken_evenly_and_only_by_the_given_rng() -> None:
    candidates = [load(name) for name in "abcd"]
    drawn = [least_load(candidates, rng).index for rng in [random.Random(5)] for _ in range(4000)]
    again = [least_load(candidates, rng).index for rng in [random.Random(5)] for _ in range(4000)]
    assert drawn == again
    assert all(900 < count < 1100 for count in Counter(drawn).values())


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12), st.integers())
def test_no_candidate_has_strictly_less_to_do_than_the_chosen_one(loads: list[tuple[int, int]], seed: int) -> None:
    candidates = [load(str(i), running, unreported=sent) for i, (running, sent) in enumerate(loads)]
    chosen = candidates[least_load(candidates, random.Random(seed)).index]
    assert chosen.requests == min(candidate.requests for candidate in candidates)


@given(st.integers(2, 8), st.integers(1, 200), st.integers())
def test_a_burst_on_stale_reports_spreads_evenly(replicas: int, burst: int, seed: int) -> None:
    """Reports stay at zero for the whole burst; only what was sent is counted."""
    rng = random.Random(seed)
    sent = [0] * replicas
    for _ in range(burst):
        candidates = [load(str(i), unreported=count) for i, count in enumerate(sent)]
        sent[least_load(candidates, rng).index] += 1
    assert max(sent) - min(sent) <= 1
