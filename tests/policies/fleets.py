"""Factories of fleets and requests for the tests of policies."""

from __future__ import annotations

from typing import Any

from policies.fleet_view import FleetLoads, RouteRequest
from policies.prefix_history import HistoryIndex
from policies.prefix_index import PrefixIndex
from replicas.protocol import EngineStats, KVEvent, ReplicaState, ReplicaStatus, block_hash, prefix_root

GATEWAY = "gateway-1"
SIZE = 16


def chain(*names: int) -> tuple[bytes, ...]:
    hashes: list[bytes] = []
    for name in names:
        hashes.append(block_hash(hashes[-1] if hashes else prefix_root("", "w"), [name] * SIZE))
    return tuple(hashes)


def request(*names: int, tokens: int | None = None) -> RouteRequest:
    """A prompt of these full blocks and one token more."""
    count = len(names) * SIZE + 1 if tokens is None else tokens
    return RouteRequest(request_id="q", prompt_tokens=count, hashes=chain(*names), block_size=SIZE)


def status(
    name: str, *, incarnation: str = "1", admitted: int = 0, draining: bool = False, **stats: Any
) -> ReplicaStatus:
    numbers = {"kv_blocks_total": 1000, "kv_blocks_free": 1000, "prefill_rate": 1000.0, "block_release_rate": 100.0}
    return ReplicaStatus(
        replica_id=name,
        incarnation=incarnation,
        model="m",
        state=ReplicaState.DRAINING if draining else ReplicaState.READY,
        stats=EngineStats(**(numbers | stats)),
        admitted={GATEWAY: admitted},
    )


def fleet(*names: str, history: int = 1000) -> FleetLoads:
    loads = FleetLoads(GATEWAY, prefixes=PrefixIndex(max_entries=1 << 14), history=HistoryIndex(history))
    for name in names:
        loads.join(name, "1")
        loads.report(status(name))
    return loads


def hold(loads: FleetLoads, name: str, hashes: tuple[bytes, ...]) -> None:
    """The replica's first event: it caches these blocks."""
    assert isinstance(loads.prefixes, PrefixIndex)
    loads.prefixes.apply(name, "1", 1, [KVEvent(kind="stored", hashes=hashes)])
