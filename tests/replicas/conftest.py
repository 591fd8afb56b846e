"""Replicas on real sockets in this process, taken down and searched for leaks after every test."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from replicas.client import ReplicaConnection
from replicas.fake import FakeEngine, FakeSettings
from replicas.protocol import GenerateRequest, ReplicaAddress, SamplingParams
from replicas.server import ReplicaServer, ServerLimits

_numbers = itertools.count(1)


def request(
    prompt: str = "hello", *, request_id: str = "", tenant: str = "", note: str = "", **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id or f"r{next(_numbers)}",
        prompt_token_ids=tuple(prompt.encode()),
        sampling=SamplingParams(**sampling),
        tenant=tenant,
        note=note,
    )


async def eventually(condition: Any, *, within_s: float = 2.0) -> None:
    """Wait for what another thread is about to do; fails the test if it does not."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def ask() -> Callable[..., GenerateRequest]:
    return request


@dataclass
class Room:
    """Starts replicas and connections, and ends them all."""

    servers: list[ReplicaServer] = field(default_factory=list)
    engines: list[FakeEngine] = field(default_factory=list)
    connections: list[ReplicaConnection] = field(default_factory=list)
    broken: bool = False  # the test broke an engine on purpose: its books are not to be trusted

    def replica(self, *, limits: ServerLimits | None = None, engine: Any = None, **settings: Any) -> ReplicaServer:
        engine = engine or FakeEngine(FakeSettings(**settings))
        number = next(_numbers)
        server = ReplicaServer(engine, replica_id=f"replica-{number}", incarnation=f"life-{number}", limits=limits)
        self.engines.append(engine)
        self.servers.append(server)
        server.start()
        return server

    async def connect(self, address: ReplicaAddress | ReplicaServer, **options: Any) -> ReplicaConnection:
        address = address.address if isinstance(address, ReplicaServer) else address
        conn = await ReplicaConnection.connect(address, **{"gateway_id": f"gateway-{next(_numbers)}", **options})
        self.connections.append(conn)
        return conn

    async def pair(self, **settings: Any) -> tuple[FakeEngine, ReplicaConnection]:
        conn = await self.connect(self.replica(**settings))
        return self.engines[-1], conn


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    room = Room()
    yield room
    for conn in room.connections:
        await conn.aclose()
        assert conn.in_flight == 0
    if not room.broken:
        await eventually(lambda: not any(engine.has_work() for engine in room.engines))
    for engine, server in zip(room.engines, room.servers, strict=True):
        getattr(engine, "hang", threading.Event()).set()
        await asyncio.to_thread(server.stop)
        if not room.broken:
            engine.check_integrity()
            stats = engine.stats()
            assert stats.kv_blocks_free == stats.kv_blocks_total
            assert stats.num_requests_running == stats.num_requests_waiting == stats.queued_tokens == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]
    assert asyncio.all_tasks() == {asyncio.current_task()}
