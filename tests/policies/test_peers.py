from __future__ import annotations

import inspect
import random
from collections import Counter

import pytest

from policies.fleet_view import FleetLoads
from policies.peers import POLICIES, cache_aware, least_load, power_of_two
from tests.policies.fleets import fleet, request, status


def send_to(loads: FleetLoads, name: str, count: int, *names: int) -> None:
    """Requests that only `name` may take."""
    others = [other for other in loads.view().replica_ids if other != name]
    for _ in range(count):
        prompt = request(*names)
        loads.sent(prompt, least_load(prompt, loads.view(avoid=others), 0.0, random.Random(0)), 1 << 30)


def test_least_load_counts_what_runs_waits_and_was_sent() -> None:
    loads = fleet("a", "b", "c")
    loads.report(status("a", num_requests_running=2))
    loads.report(status("b", num_requests_running=1, num_requests_waiting=2))
    send_to(loads, "c", 3)
    assert least_load(request(1), loads.view(), 0.0, random.Random(0)).replica_id == "a"


def test_power_of_two_never_takes_the_busiest_and_draws_evenly() -> None:
    loads, rng = fleet("a", "b", "c"), random.Random(0)
    loads.report(status("c", num_requests_running=9))
    chosen = Counter(power_of_two(request(1), loads.view(), 0.0, rng).replica_id for _ in range(600))
    assert set(chosen) == {"a", "b"}
    assert min(chosen.values()) > 240
    assert power_of_two(request(1), fleet("alone").view(), 0.0, rng).replica_id == "alone"


def test_cache_aware_follows_a_match_of_more_than_three_tenths() -> None:
    loads, rng = fleet("a", "b"), random.Random(0)
    send_to(loads, "b", 1, *range(4))
    assert cache_aware(request(*range(4), *range(10, 16)), loads.view(), 0.0, rng).replica_id == "b"  # 64 of 161
    assert cache_aware(request(*range(3), *range(10, 20)), loads.view(), 0.0, rng).replica_id == "a"  # 48 of 209


def test_cache_aware_without_a_match_takes_the_smallest_tree_however_loaded() -> None:
    loads = fleet("a", "b")
    send_to(loads, "a", 40, 1)
    send_to(loads, "b", 1, 2, 3)
    assert cache_aware(request(7, 8), loads.view(), 0.0, random.Random(0)).replica_id == "a"


@pytest.mark.parametrize(("most", "least", "balances"), [(64, 0, False), (65, 0, True), (195, 130, False)])
def test_cache_aware_balances_only_when_far_apart_in_number_and_in_ratio(most: int, least: int, balances: bool) -> None:
    loads = fleet("a", "b")
    send_to(loads, "a", most, 1, 2, 3)
    send_to(loads, "b", least, 9)
    chosen = cache_aware(request(1, 2, 3), loads.view(), 0.0, random.Random(0)).replica_id
    assert chosen == ("b" if balances else "a")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_under_its_own_name_and_short(name: str) -> None:
    policy = POLICIES[name]
    assert policy(request(1), fleet("a").view(), 0.0, random.Random(0)).policy == name
    assert len(inspect.getsource(policy).splitlines()) <= 60
