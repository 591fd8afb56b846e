"""Replica and gateway side together, over real sockets, with the fake engine in the replica's thread."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
import zmq

from replicas import wire
from replicas.client import ReplicaConnection
from replicas.protocol import (
    Chunk,
    EngineFault,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    KVEvent,
    NotSupported,
    QueueFull,
    ReplicaAddress,
    ReplicaDraining,
    ReplicaLost,
    ReplicaState,
    SignalboxError,
)
from replicas.server import ReplicaServer, ServerLimits, ThreadState

Ask = Callable[..., GenerateRequest]


async def collect(conn: ReplicaConnection, request: GenerateRequest) -> list[Chunk]:
    async with aclosing(conn.generate(request)) as lists:
        return [chunk async for ready in lists for chunk in ready]


async def first(conn: ReplicaConnection, request: GenerateRequest) -> Any:
    """The generator, after its first chunks came."""
    lists = conn.generate(request)
    assert await anext(lists)
    return lists


async def outcome(conn: ReplicaConnection, request: GenerateRequest) -> tuple[int, BaseException | None]:
    """(tokens seen, how it ended)."""
    tokens = 0
    try:
        async with aclosing(conn.generate(request)) as lists:
            async for ready in lists:
                tokens += sum(len(chunk.token_ids) for chunk in ready)
    except SignalboxError as error:
        return tokens, error
    return tokens, None


async def eventually(condition: Callable[[], bool], *, within_s: float = 2.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_many_streams_share_a_connection_and_each_gets_its_own_text(room: Any, ask: Ask) -> None:
    _, conn = await room.pair()
    alone = [await collect(conn, ask(f"prompt {i}", max_tokens=50, seed=i)) for i in range(8)]
    together = await asyncio.gather(*(collect(conn, ask(f"prompt {i}", max_tokens=50, seed=i)) for i in range(8)))
    texts = ["".join(chunk.text for chunk in chunks) for chunks in alone]
    assert texts == ["".join(chunk.text for chunk in chunks) for chunks in together]
    for chunks in together:
        assert [chunk.terminal for chunk in chunks] == [False] * 49 + [True]
        assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_the_card_and_a_status_are_there_after_connecting(room: Any) -> None:
    engine, conn = await room.pair(max_model_len=77)
    assert conn.card == engine.card
    assert conn.status is not None
    assert conn.status.state is ReplicaState.READY
    assert 0 < await conn.ping() < 1


@pytest.mark.parametrize(
    ("settings", "asked", "error"),
    [
        ({}, {"logprobs": 1}, NotSupported),
        ({}, {"n": 0}, InvalidRequest),
        ({"refuse_as_full": True}, {}, QueueFull),
        ({"fail_after_tokens": 2}, {}, EngineFault),
    ],
)
async def test_the_engines_refusal_is_raised_as_its_own_type(
    room: Any, ask: Ask, settings: dict[str, Any], asked: dict[str, Any], error: type[SignalboxError]
) -> None:
    _, conn = await room.pair(**settings)
    _, found = await outcome(conn, ask(**asked))
    assert type(found) is error


async def test_the_same_id_twice_is_refused_and_the_first_lives_on(room: Any, ask: Ask) -> None:
    server = room.replica(tokens_per_s=100)
    one, two = await room.connect(server), await room.connect(server)
    lists = await first(one, ask(request_id="same", max_tokens=10))
    for conn in (one, two):
        _, error = await outcome(conn, ask(request_id="same"))
        assert isinstance(error, InvalidRequest)
    rest = [chunk async for ready in lists for chunk in ready]
    assert rest[-1].usage is not None


async def test_leaving_a_stream_frees_its_blocks_at_once(room: Any, ask: Ask) -> None:
    engine, conn = await room.pair(tokens_per_s=50)
    lists = await first(conn, ask(max_tokens=5000))
    assert engine.stats().num_requests_running == 1
    await lists.aclose()
    assert conn.in_flight == 0
    await eventually(lambda: not engine.has_work(), within_s=0.5)


async def test_a_cancelled_reader_aborts_its_request(room: Any, ask: Ask) -> None:
    engine, conn = await room.pair(tokens_per_s=50)
    reader = asyncio.create_task(collect(conn, ask(max_tokens=5000)))
    await eventually(lambda: engine.has_work())
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await eventually(lambda: not engine.has_work(), within_s=0.5)


async def test_a_gateway_that_vanishes_has_its_requests_aborted(room: Any, ask: Ask) -> None:
    """The waiting ones too, to which the replica has nothing to send."""
    server = room.replica(tokens_per_s=1, max_num_seqs=1)
    staying = await room.connect(server)
    engine = room.engines[0]
    with zmq.Context() as context, context.socket(zmq.DEALER) as leaving:
        leaving.set(zmq.LINGER, 0)
        leaving.connect(server.address.endpoint)
        leaving.send(wire.encode(wire.Describe("leaving", server.address.incarnation)))
        for seq in (1, 2, 3):
            leaving.send(wire.encode(wire.submit(seq, ask(max_tokens=5000))))
        await eventually(lambda: engine.stats().num_requests_waiting == 2)
    await eventually(lambda: not engine.has_work())
    assert len(await collect(staying, ask(max_tokens=1))) == 1


async def test_the_status_echoes_which_submissions_its_numbers_include(room: Any, ask: Ask) -> None:
    _, conn = await room.pair(tokens_per_s=20)
    assert conn.next_seq == 1
    lists = conn.generate(ask("x" * 40, max_tokens=50))
    reader = asyncio.create_task(anext(lists))
    await asyncio.sleep(0)
    assert (conn.in_flight, conn.next_seq) == (1, 2)
    await reader
    await eventually(lambda: conn.status.admitted.get(conn.gateway_id) == 1)
    assert conn.status.stats.num_requests_running == 1
    await lists.aclose()


class Heard:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.statuses: list[Any] = []
        self.published: list[tuple[int, KVEvent]] = []
        self.snapshots: list[tuple[int, bytes]] = []

    def status(self, status: Any) -> None:
        self.statuses.append(status)

    def events(self, first: int, events: Sequence[KVEvent]) -> None:
        self.published += enumerate(events, first)

    def snapshot(self, next_event: int, hashes: bytes) -> None:
        self.snapshots.append((next_event, hashes))


async def test_kv_events_arrive_numbered_and_in_order(room: Any, ask: Ask) -> None:
    heard = Heard()
    conn = await room.connect(room.replica(), listener=heard)
    await asyncio.sleep(0.1)  # a subscription takes a moment to arrive
    await collect(conn, ask("x" * 64, max_tokens=1))
    await collect(conn, ask("y" * 64, max_tokens=1))
    await eventually(lambda: len(heard.published) == 2)
    assert [(number, event.kind, len(event.hashes)) for number, event in heard.published] == [
        (1, "stored", 4),
        (2, "stored", 4),
    ]


async def test_a_listener_that_came_late_gets_a_snapshot_that_its_events_continue(room: Any, ask: Ask) -> None:
    server = room.replica()
    early, late = Heard(), Heard()
    conn = await room.connect(server, listener=early)
    await asyncio.sleep(0.1)
    await collect(conn, ask("x" * 64, max_tokens=1))
    await eventually(lambda: early.published)
    other = await room.connect(server, listener=late)
    other.resync()
    await eventually(lambda: late.snapshots)
    (number, packed), blocks = late.snapshots[0], early.published[0][1].hashes
    assert (number, {packed[i : i + 16] for i in range(0, len(packed), 16)}) == (2, set(blocks))
    await asyncio.sleep(0.1)
    await collect(other, ask("y" * 64, max_tokens=1))
    await eventually(lambda: late.published)
    assert late.published[0][0] == 2


async def test_garbage_is_refused_and_the_replica_lives(room: Any, ask: Ask) -> None:
    server = room.replica()
    conn = await room.connect(server)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.set(zmq.LINGER, 0)
        stranger.set(zmq.RCVTIMEO, 2000)
        stranger.connect(server.address.endpoint)
        submit = wire.encode(wire.submit(1, ask()))
        for parts in ([b""], [b"\x01garbage"], [b"\x63" + submit[1:]], [b"a", b"b", b"c"], [submit]):
            stranger.send_multipart(parts)
            answer = wire.decode_to_gateway(await asyncio.to_thread(stranger.recv))
            assert isinstance(answer, wire.Refused)
        assert "described" in answer.reason
    assert server.unreadable_frames == 4
    assert await collect(conn, ask())


async def test_another_incarnation_at_the_address_is_not_mistaken(room: Any) -> None:
    address = room.replica().address
    old = ReplicaAddress(
        replica_id=address.replica_id,
        incarnation="an older life",
        model=address.model,
        endpoint=address.endpoint,
        events_endpoint=address.events_endpoint,
    )
    with pytest.raises(ReplicaLost, match="incarnation"):
        await room.connect(old)


async def test_connecting_to_nobody_fails_at_once(room: Any) -> None:
    server = room.replica()
    server.stop()
    begin = time.monotonic()
    with pytest.raises(ReplicaLost):
        await room.connect(server)
    assert time.monotonic() - begin < 1


async def test_a_step_that_raises_ends_everything_it_held_and_the_health(room: Any, ask: Ask) -> None:
    room.broken = True
    server = room.replica(raise_after_tokens=3, max_num_seqs=2, tokens_per_s=20)
    conn = await room.connect(server)
    assert server.healthy()
    ends = await asyncio.gather(*(outcome(conn, ask(max_tokens=9)) for _ in range(4)))
    assert [type(error) for _, error in ends] == [EngineFault] * 4
    assert server.state is ThreadState.FAILED
    assert not server.healthy()
    assert type((await outcome(conn, ask()))[1]) is ReplicaLost
    assert conn.status is not None
    await eventually(lambda: conn.status is not None and conn.status.state is ReplicaState.DRAINING)


async def test_a_stuck_step_is_noticed(room: Any, ask: Ask) -> None:
    server = room.replica(hang_after_tokens=2, limits=ServerLimits(stall_s=0.2))
    conn = await room.connect(server)
    await asyncio.sleep(0.3)
    assert server.healthy()  # an idle thread is not a stuck one
    lists = await first(conn, ask(max_tokens=2))
    await eventually(lambda: not server.healthy())
    room.engines[0].hang.set()
    await eventually(server.healthy)
    await lists.aclose()


async def test_a_request_that_the_engine_forgets_still_ends(room: Any, ask: Ask) -> None:
    server = room.replica()
    engine = room.engines[0]
    engine.step = lambda: [Chunk(request_id=str(engine.abort(next(iter(engine._jobs)))))]
    conn = await room.connect(server)
    _, error = await outcome(conn, ask())
    assert isinstance(error, EngineFault)


async def test_drain_finishes_what_runs_and_refuses_the_rest(room: Any, ask: Ask) -> None:
    server = room.replica(tokens_per_s=50)
    conn = await room.connect(server)
    lists = await first(conn, ask(max_tokens=20))
    draining = asyncio.create_task(asyncio.to_thread(server.drain, 5.0))
    await eventually(lambda: conn.status is not None and conn.status.state is ReplicaState.DRAINING)
    assert type((await outcome(conn, ask()))[1]) is ReplicaDraining
    rest = [chunk async for ready in lists for chunk in ready]
    assert rest[-1].usage is not None
    assert await draining is True


async def test_drain_hands_back_what_has_no_token_at_the_deadline(room: Any, ask: Ask) -> None:
    server = room.replica(tokens_per_s=20, max_num_seqs=1)
    conn = await room.connect(server)
    running = asyncio.create_task(outcome(conn, ask(max_tokens=1000)))
    await eventually(lambda: room.engines[0].stats().generation_tokens > 0)
    waiting = asyncio.create_task(outcome(conn, ask(max_tokens=1000)))
    await eventually(lambda: room.engines[0].stats().num_requests_waiting == 1)
    assert await asyncio.to_thread(server.drain, 0.2) is False
    tokens, error = await running
    assert tokens > 0
    assert type(error) is ReplicaLost
    assert type((await waiting)[1]) is ReplicaDraining
    assert not room.engines[0].has_work()


async def test_stopping_ends_streams_and_the_connection(room: Any, ask: Ask) -> None:
    server = room.replica(tokens_per_s=20)
    conn = await room.connect(server)
    lists = await first(conn, ask(max_tokens=1000))
    await asyncio.to_thread(server.stop)
    with pytest.raises(ReplicaLost):
        [ready async for ready in lists]
    await asyncio.wait_for(conn.wait_closed(), 2)
    assert not conn.alive
    with pytest.raises(ReplicaLost):
        await anext(conn.generate(ask()))
    room.broken = True  # its engine was left in the middle of a request


async def test_a_gateway_that_reads_nothing_is_cut_off(room: Any, ask: Ask) -> None:
    server = room.replica(limits=ServerLimits(max_unread_bytes=200_000))
    conn = await room.connect(server)
    lists = await first(conn, ask(max_tokens=8000))
    asyncio.get_running_loop().remove_reader(conn._sockets.dealer.fileno())
    engine = room.engines[0]
    flood = [conn.generate(ask(max_tokens=8000)) for _ in range(20)]
    readers = [asyncio.create_task(anext(each)) for each in flood]
    await eventually(lambda: engine.stats().num_requests_running > 0 or engine.stats().generation_tokens > 8000)
    await eventually(lambda: not engine.has_work(), within_s=10)
    conn._read_dealer()
    with pytest.raises(ReplicaLost):
        [ready async for ready in lists]
    await asyncio.gather(*readers, return_exceptions=True)
    for each in flood:
        await each.aclose()
    assert not conn.alive


CHILD = """
import sys, time
from replicas.fake import FakeEngine, FakeSettings
from replicas.server import ReplicaServer
server = ReplicaServer(FakeEngine(FakeSettings(tokens_per_s=20)), replica_id="child", incarnation="child-1")
address = server.start()
print(address.endpoint, address.events_endpoint, flush=True)
time.sleep(60)
"""


@contextmanager
def replica_process() -> Iterator[tuple[subprocess.Popen[str], ReplicaAddress]]:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint, events = process.stdout.readline().split()
        try:
            yield (
                process,
                ReplicaAddress(
                    replica_id="child", incarnation="child-1", model="fake", endpoint=endpoint, events_endpoint=events
                ),
            )
        finally:
            process.kill()


async def test_kill_9_of_the_replica_ends_every_stream_within_two_seconds(room: Any, ask: Ask) -> None:
    with replica_process() as (process, address):
        conn = await room.connect(address)
        streams = [asyncio.create_task(outcome(conn, ask(max_tokens=1000))) for _ in range(5)]
        await asyncio.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        begin = time.monotonic()
        ends = await asyncio.gather(*streams)
        assert time.monotonic() - begin < 0.5
        assert all(tokens > 0 and type(error) is ReplicaLost for tokens, error in ends)


async def test_a_frozen_process_is_noticed_by_heartbeats(room: Any, ask: Ask) -> None:
    with replica_process() as (process, address):
        conn = await room.connect(address)
        stream = asyncio.create_task(outcome(conn, ask(max_tokens=1000)))
        await asyncio.sleep(0.3)
        os.kill(process.pid, signal.SIGSTOP)
        _, error = await asyncio.wait_for(stream, 4)
        assert type(error) is ReplicaLost
        os.kill(process.pid, signal.SIGCONT)


async def test_uvloop_carries_it_too(ask: Ask) -> None:
    import uvloop

    from replicas.fake import FakeEngine

    server = ReplicaServer(FakeEngine(), replica_id="r", incarnation="i")
    server.start()

    async def talk() -> int:
        conn = await ReplicaConnection.connect(server.address, gateway_id="g")
        found = await asyncio.gather(*(collect(conn, ask(max_tokens=200)) for _ in range(16)))
        await conn.aclose()
        return sum(len(chunk.token_ids) for chunks in found for chunk in chunks)

    def run() -> int:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(talk())

    assert await asyncio.to_thread(run) == 16 * 200
    server.stop()
