from __future__ import annotations

import random

from policies.affinity import affinity
from policies.fleet_view import FleetLoads
from policies.peers import round_robin
from tests.policies.fleets import fleet, request, status


def send(loads: FleetLoads, seq: int) -> None:
    prompt = request(1, 2)
    loads.sent(prompt, affinity(prompt, loads.view(), 0.0, random.Random(0)), seq)


def sent(loads: FleetLoads) -> list[float]:
    view = loads.view()
    return [float(view.column(name)[0]) for name in ("sent_requests", "sent_tokens", "sent_blocks", "in_flight")]


def test_what_was_sent_counts_until_the_replica_echoes_it() -> None:
    loads = fleet("a")
    for seq in (1, 2, 3):
        send(loads, seq)
    assert sent(loads) == [3, 99, 9, 3]
    loads.report(status("a", admitted=2, num_requests_waiting=2, queued_tokens=66))
    assert sent(loads) == [1, 33, 3, 3]
    assert loads.view().requests.tolist() == [3]
    assert loads.view().queued_tokens.tolist() == [99]
    assert loads.unechoed("a") == [3]
    loads.report(status("a", admitted=1))  # an older report overtaken on the way takes nothing back
    assert sent(loads) == [1, 33, 3, 3]
    loads.report(status("a", admitted=3))
    assert sent(loads) == [0, 0, 0, 3]


def test_an_echo_that_comes_before_the_count_leaves_nothing_behind() -> None:
    loads = fleet("a")
    loads.report(status("a", admitted=1))
    send(loads, 1)
    assert sent(loads) == [0, 0, 0, 1]
    loads.ended("a")
    assert sent(loads) == [0, 0, 0, 0]


def test_a_new_incarnation_owes_nothing_of_the_old_one() -> None:
    loads = fleet("a", "b")
    send(loads, 1)
    loads.report(status("a", draining=True))
    loads.join("a", "2")
    assert sent(loads) == [0, 0, 0, 0]
    loads.report(status("a", incarnation="1", queued_tokens=77, draining=True))  # still on its way from the dead
    assert loads.view().queued_tokens.tolist()[0] == 0
    assert loads.view().eligible.tolist() == [True, True]
    loads.ended("a", "1")
    assert sent(loads) == [0, 0, 0, 0]


def test_columns_stay_with_their_replicas_when_another_leaves() -> None:
    loads = fleet("a", "b", "c")
    loads.report(status("c", queued_tokens=5))
    loads.leave("a")
    loads.leave("nobody")
    loads.report(status("c", queued_tokens=7))
    loads.report(status("a", queued_tokens=9))
    view = loads.view()
    assert view.replica_ids == ("b", "c")
    assert view.queued_tokens.tolist() == [0, 7]


def test_a_joined_replica_without_a_report_takes_work() -> None:
    loads = fleet()
    loads.join("new", "1")
    assert affinity(request(1), loads.view(), 0.0, random.Random(0)).replica_id == "new"


def test_round_robin_takes_turns_among_those_that_take_work() -> None:
    loads, rng, chosen = fleet("a", "b", "c"), random.Random(0), []
    loads.report(status("b", draining=True))
    for seq in range(4):
        decision = round_robin(request(1), loads.view(), 0.0, rng)
        loads.sent(request(1), decision, seq + 1)
        chosen.append(decision.replica_id)
    assert chosen == ["a", "c", "a", "c"]
