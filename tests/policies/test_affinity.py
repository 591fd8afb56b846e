from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import affinity as module
from policies.affinity import affinity
from policies.fleet_view import FleetLoads, RouteRequest
from policies.peers import POLICIES
from policies.prefix_index import PrefixIndex
from replicas.protocol import KVEvent, NoReplica, RouteDecision
from tests.policies.fleets import chain, fleet, hold, request, status


def choose(loads: FleetLoads, prompt: RouteRequest, rng: random.Random | None = None) -> RouteDecision:
    return affinity(prompt, loads.view(), 0.0, rng or random.Random(0))


def test_the_replica_that_holds_the_prefix_wins_when_all_are_idle() -> None:
    loads, prompt = fleet("a", "b", "c"), request(1, 2, 3, 4)
    hold(loads, "b", chain(1, 2, 9))
    hold(loads, "c", chain(1, 2, 3))
    decision = choose(loads, prompt)
    assert decision.replica_id == "c"
    assert (decision.uncached_tokens, decision.new_blocks) == (65 - 48, 2)


def test_a_queue_longer_than_the_prefix_is_worth_sends_it_elsewhere() -> None:
    loads, prompt = fleet("a", "b"), request(*range(10))
    hold(loads, "a", chain(*range(10)))
    loads.report(status("a", queued_tokens=100))
    assert choose(loads, prompt).replica_id == "a"
    loads.report(status("a", queued_tokens=400))
    assert choose(loads, prompt).replica_id == "b"


def test_a_hot_prefix_replicates_itself_under_load() -> None:
    """Every request shares one long prefix; replicas cache what they are sent and report nothing else."""
    loads, rng = fleet("a", "b", "c", "d"), random.Random(0)
    numbers = Counter(dict.fromkeys("abcd", 1))
    chosen: Counter[str] = Counter()
    for number in range(400):
        prompt = request(*range(20), 1000 + number)
        decision = choose(loads, prompt, rng)
        loads.sent(prompt, decision, number + 1)
        chosen[decision.replica_id] += 1
        assert isinstance(loads.prefixes, PrefixIndex)
        loads.prefixes.apply(
            decision.replica_id, "1", numbers[decision.replica_id], [KVEvent(kind="stored", hashes=prompt.hashes)]
        )
        numbers[decision.replica_id] += 1
    assert min(chosen.values()) >= 80, chosen
    assert loads.prefixes.leading(chain(*range(20)), tuple("abcd")).tolist() == [20] * 4


def test_a_slow_replica_with_the_prefix_loses_to_a_fast_one_without() -> None:
    loads = fleet("slow", "fast")
    loads.report(status("slow", prefill_rate=10.0))
    loads.report(status("fast", prefill_rate=1000.0))
    hold(loads, "slow", chain(1, 2, 3))
    assert choose(loads, request(1, 2, 3, 4)).replica_id == "fast"


def test_a_replica_that_lacks_blocks_is_charged_the_wait_for_their_release() -> None:
    loads = fleet("full", "free")
    loads.report(status("full", kv_blocks_free=0, num_requests_running=1, block_release_rate=10.0))
    loads.report(status("free", queued_tokens=300))
    decision = choose(loads, request(1, 2, 3))
    assert decision.replica_id == "free"
    assert tuple(decision.terms["blocks_ms"]) == (pytest.approx(400.0), 0.0)


def test_while_no_rate_is_known_fewer_tokens_win_and_one_known_rate_stands_for_the_others() -> None:
    loads = fleet("a", "b")
    for name, queued in (("a", 50), ("b", 20)):
        loads.report(status(name, prefill_rate=0.0, block_release_rate=0.0, queued_tokens=queued, kv_blocks_free=0))
    assert choose(loads, request(1)).replica_id == "b"
    loads.report(status("a", prefill_rate=500.0, queued_tokens=50))
    decision = choose(loads, request(1))
    assert tuple(decision.terms["queue_ms"]) == (100.0, 40.0)


def test_a_decision_keeps_every_candidates_terms_and_what_it_predicts() -> None:
    loads = fleet("a", "b")
    loads.report(status("a", queued_tokens=100, decode_step_s=0.02, num_requests_running=2))
    decision = affinity(request(1), loads.view(generation=7), 0.0, random.Random(0))
    assert (decision.policy, decision.generation, decision.candidates) == ("affinity", 7, ("a", "b"))
    assert all(len(term) == 2 for term in decision.terms.values())
    best = decision.candidates.index(decision.replica_id)
    assert decision.terms["score"][best] == min(decision.terms["score"])
    parts = ("queue_ms", "blocks_ms", "prefill_ms", "decode_ms")
    queue, blocks, prefill, decode = (decision.terms[part][best] for part in parts)
    assert decision.predicted_ms == pytest.approx(max(queue, blocks) + prefill + decode)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replica_that_drains_or_is_lost_or_was_tried_is_never_chosen(policy: str) -> None:
    loads, rng = fleet("drains", "lost", "tried", "ok"), random.Random(0)
    hold(loads, "drains", chain(1, 2, 3))
    hold(loads, "lost", chain(1, 2, 3))
    for name in ("ok", "tried"):
        loads.report(status(name, queued_tokens=5000, num_requests_running=9, num_requests_waiting=90))
    loads.report(status("drains", draining=True))
    loads.leave("lost")
    for number in range(50):
        prompt = request(1, 2, 3)
        decision = POLICIES[policy](prompt, loads.view(avoid={"tried"}), 0.0, rng)
        loads.sent(prompt, decision, number + 1)
        assert decision.replica_id == "ok"
        assert decision.candidates == ("ok",)
    with pytest.raises(NoReplica):
        POLICIES[policy](request(1), loads.view(avoid={"tried", "ok"}), 0.0, rng)
    with pytest.raises(NoReplica):
        POLICIES[policy](request(1), fleet().view(), 0.0, rng)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 120), st.integers(1, 40), st.integers())
def test_no_burst_piles_on_one_replica_while_reports_are_stale(
    replicas: int, burst: int, blocks: int, seed: int
) -> None:
    """All reports say idle for the whole burst; only what was sent is counted."""
    names = [f"r{n}" for n in range(replicas)]
    loads, rng = fleet(*names), random.Random(seed)
    chosen: Counter[str] = Counter()
    for number in range(burst):
        prompt = request(*(1000 * number + n for n in range(blocks)))
        decision = choose(loads, prompt, rng)
        chosen[decision.replica_id] += 1
        loads.sent(prompt, decision, chosen[decision.replica_id])
    assert max(chosen.values()) - min(chosen[name] for name in names) <= 1


def test_the_same_seed_gives_the_same_choices() -> None:
    def draw() -> list[str]:
        loads, rng = fleet("a", "b", "c"), random.Random(5)
        return [choose(loads, request(1), rng).replica_id for _ in range(50)]

    assert draw() == draw()
    assert set(draw()) == {"a", "b", "c"}


_STATS = st.fixed_dictionaries(
    {
        "num_requests_running": st.integers(0, 300),
        "num_requests_waiting": st.integers(0, 300),
        "queued_tokens": st.integers(0, 10**6),
        "kv_blocks_free": st.integers(0, 1000),
        "prefill_rate": st.just(0.0) | st.floats(1.0, 1e6),
        "decode_step_s": st.floats(0.0, 1.0),
        "block_release_rate": st.just(0.0) | st.floats(0.1, 1e5),
    }
)


@settings(deadline=None)
@given(st.lists(st.tuples(_STATS, st.integers(0, 5), st.booleans()), min_size=1, max_size=4), st.integers(0, 2**32))
def test_few_replicas_are_scored_one_by_one_to_the_same_decision(
    replicas: list[tuple[dict[str, float], int, bool]], seed: int
) -> None:
    loads = fleet(*(f"r{n}" for n in range(len(replicas))))
    for number, (stats, held, draining) in enumerate(replicas):
        loads.report(status(f"r{number}", draining=draining, **stats))
        hold(loads, f"r{number}", chain(*range(held)))
    prompt, view = request(*range(5)), loads.view()
    if all(draining for _, _, draining in replicas):
        for way in (module._one_by_one, module._all_at_once):
            with pytest.raises(NoReplica):
                way(prompt, view, random.Random(seed))
        return
    one, all_ = (way(prompt, view, random.Random(seed)) for way in (module._one_by_one, module._all_at_once))
    assert (one.replica_id, one.candidates) == (all_.replica_id, all_.candidates)
    assert (one.uncached_tokens, one.new_blocks) == (all_.uncached_tokens, all_.new_blocks)
    assert one.predicted_ms == pytest.approx(all_.predicted_ms)
    assert {name: pytest.approx(tuple(each)) for name, each in one.terms.items()} == {
        name: tuple(each) for name, each in all_.terms.items()
    }
