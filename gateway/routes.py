"""One model's replicas as its routing policy sees them: their load, their caches, and who is connected.

Joins the live connections (I/O) with the policies' own books (pure). Every decision is counted at once, so that a burst
does not pile onto the replica that reported idle last, and is taken back when its request ends.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.connection import Connection
from gateway.spared import Spared
from policies.admission import Bounds
from policies.breaker import BreakerSettings, Outcome, Permit
from policies.fleet_view import FleetLoads, RouteRequest
from policies.peers import POLICIES
from policies.prefix_history import HistoryIndex
from policies.prefix_index import PrefixIndex
from replicas.protocol import (
    KVEvent,
    ModelCard,
    NoReplica,
    ReplicaState,
    ReplicaStatus,
    RouteDecision,
    block_hashes,
    prefix_root,
)

DEFAULT_POLICY = "affinity"
_HASH_BYTES = 16
# What a policy that keeps a history of its own (cache_aware) remembers of each replica.
_HISTORY_BLOCKS = 65_536


def route_request(
    card: ModelCard, tenant: str, request_id: str, prompt: Sequence[int], max_tokens: int
) -> RouteRequest:
    """The prompt as policies see it. About 0.1 ms per thousand tokens."""
    root = prefix_root(tenant, card.revision, card.kv_format)
    return RouteRequest(
        request_id=request_id,
        prompt_tokens=len(prompt),
        hashes=block_hashes(root, prompt, card.block_size),
        block_size=card.block_size,
        max_tokens=max_tokens,
    )


class _Published:
    """Takes what one incarnation of a replica publishes into the books, and asks for what was missed."""

    def __init__(self, routes: Routes, replica_id: str, incarnation: str) -> None:
        self._routes = routes
        self._replica_id = replica_id
        self._incarnation = incarnation
        self._connection: Connection | None = None
        self._asked = False
        self._applying: asyncio.Task[None] | None = None

    def connected(self, connection: Connection) -> None:
        self._connection = connection
        self._routes.prefixes.expect_snapshot(self._replica_id, self._incarnation)
        self._ask()

    def close(self) -> None:
        if self._applying is not None:
            self._applying.cancel()

    def status(self, status: ReplicaStatus) -> None:
        self._routes.loads.report(status)

    def events(self, first: int, events: Sequence[KVEvent]) -> None:
        if self._connection is not None and self._routes.prefixes.apply(
            self._replica_id, self._incarnation, first, events
        ):
            self._ask()

    def snapshot(self, next_event: int, hashes: bytes) -> None:
        self._applying = asyncio.create_task(self._apply(next_event, hashes), name=f"snapshot-{self._replica_id}")

    async def _apply(self, next_event: int, packed: bytes) -> None:
        prefixes = self._routes.prefixes
        hashes = [packed[start : start + _HASH_BYTES] for start in range(0, len(packed), _HASH_BYTES)]
        for _ in prefixes.snapshot_slices(self._replica_id, self._incarnation, next_event, hashes):
            await asyncio.sleep(0)
        self._asked = False
        if self._replica_id in prefixes.wanting:
            self._ask()

    def _ask(self) -> None:
        if not self._asked and self._connection is not None:
            self._asked = True
            self._connection.resync()


def takes_work(connection: Connection) -> bool:
    status = connection.status
    return connection.alive and (status is None or status.state is ReplicaState.READY)


@dataclass(frozen=True, slots=True)
class Choice:
    connection: Connection
    decision: RouteDecision


class Routes:
    """The replicas of one model. Belongs to one event loop."""

    def __init__(self, gateway_id: str) -> None:
        # Prompts come from strangers: which rows their blocks fall into must not be theirs to choose.
        self.prefixes = PrefixIndex(odd=random.SystemRandom().getrandbits(64) | 1)
        self.loads = FleetLoads(gateway_id, prefixes=self.prefixes)
        self._connections: dict[str, Connection] = {}
        self._published: dict[str, _Published] = {}
        self._rng = random.Random()
        self.spared = Spared()

    # ---------------------------------------------------------------- who is there

    def listener(self, replica_id: str, incarnation: str) -> _Published:
        """To be given to the connection that is about to be made to that replica."""
        return _Published(self, replica_id, incarnation)

    def join(self, connection: Connection, published: _Published) -> None:
        address = connection.address
        self._connections[address.replica_id] = connection
        self._published[address.replica_id] = published
        self.loads.join(address.replica_id, address.incarnation)
        if connection.status is not None:
            self.loads.report(connection.status)
        published.connected(connection)

    def leave(self, connection: Connection) -> None:
        """The connection is lost or given up; nothing happens if another one has taken its place."""
        replica_id = connection.address.replica_id
        if self._connections.get(replica_id) is connection:
            del self._connections[replica_id]
            self._published.pop(replica_id).close()
            self.loads.leave(replica_id)
            self.spared.forget(replica_id)
            self.prefixes.drop(replica_id)

    # ---------------------------------------------------------------- decisions

    def choose(
        self, request: RouteRequest, avoid: Collection[str], policy: str = DEFAULT_POLICY, generation: int = 0
    ) -> Choice | None:
        """Where `policy` sends the request now, None when no replica outside `avoid` takes work."""
        if policy == "cache_aware" and self.loads.history is None:
            self.loads.history = HistoryIndex(_HISTORY_BLOCKS)
        shunned = {name for name, one in self._connections.items() if name in avoid or not one.alive}
        if self.spared:
            shunned.update(self.spared.names(time.monotonic()))
        try:
            view = self.loads.view(shunned, generation)
            decision = POLICIES[policy](request, view, time.monotonic(), self._rng)
        except NoReplica:
            return None
        return Choice(self._connections[decision.replica_id], decision)

    def share(self, bounds: Bounds, replica_id: str) -> Bounds:
        """What that replica may hold of what may wait for the model. Gateways that know the same replicas agree."""
        names = sorted(name for name, one in self._connections.items() if takes_work(one))
        return bounds.share(names.index(replica_id) if replica_id in names else 0, max(len(names), 1))

    def wait_for_spared_s(self, avoid: Collection[str]) -> float | None:
        """Seconds until one that is there, and only left alone, may be asked; None if there is none such."""
        names = [name for name, one in self._connections.items() if one.alive and name not in avoid]
        return self.spared.wait_s(names, time.monotonic())

    def permit(self, choice: Choice) -> Permit | None:
        """Leave to ask a replica that has failed lately, which `judge` ends; None for all others."""
        return self.spared.permit(choice.decision.replica_id, time.monotonic()) if self.spared else None

    def started(self, choice: Choice, permit: Permit) -> None:
        """It has brought something."""
        self.spared.started(choice.decision.replica_id, permit, time.monotonic())

    def judge(self, choice: Choice | None, permit: Permit | None, outcome: Outcome, settings: BreakerSettings) -> None:
        """An attempt at a replica has ended; nothing is held against one that is gone."""
        assert choice is not None, "only an attempt that was made has a permit or fails"
        replica_id = choice.decision.replica_id
        if self._connections.get(replica_id) is choice.connection and choice.connection.alive:
            self.spared.ended(replica_id, permit, outcome, settings, time.monotonic())

    @contextmanager
    def counted(self, request: RouteRequest, choice: Choice) -> Iterator[None]:
        """Around one submission: enter directly before it, with nothing awaited in between."""
        address = choice.connection.address
        self.loads.sent(request, choice.decision, choice.connection.next_seq)
        try:
            yield
        finally:
            self.loads.ended(address.replica_id, address.incarnation)
