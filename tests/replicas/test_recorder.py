"""A replica's journal as gateways meet it, over real sockets: written before it is told, kept until acknowledged."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from replicas.client import Journaled, ReplicaConnection
from replicas.fake import FakeEngine, FakeSettings
from replicas.journal import Journal, JournalLimits, read_folder
from replicas.journal_records import Outcome
from replicas.protocol import ConfigError
from replicas.recorder import Recorder
from replicas.server import ReplicaServer
from replicas.wire import JournalAsk
from tests.replicas.conftest import Room, eventually, request

NOTE = "who pays"


def replica(room: Room, folder: Path, owner: str, **settings: Any) -> ReplicaServer:
    engine = FakeEngine(FakeSettings(**settings))
    server = ReplicaServer(engine, replica_id=owner, incarnation=owner, journal=Journal(folder, owner))
    room.engines.append(engine)
    room.servers.append(server)
    server.start()
    return server


async def finish(conn: ReplicaConnection, request_id: str, note: str = NOTE, tokens: int = 4) -> None:
    async with aclosing(conn.generate(request(request_id=request_id, note=note, max_tokens=tokens))) as stream:
        async for _ in stream:
            pass


async def known(conn: ReplicaConnection, gateway_id: str) -> dict[str, tuple[tuple[int, int, int], bool]]:
    shown = await conn.journal(gateway_id)
    return {entry.request_id: (entry.usage, entry.running) for entry in shown.entries}


async def test_a_gateway_is_shown_its_requests_until_it_acknowledges_them(room: Room, tmp_path: Path) -> None:
    server = replica(room, tmp_path, "r1")
    conn = await room.connect(server, gateway_id="gw")
    other = await room.connect(server, gateway_id="other")
    await finish(conn, "a")
    await finish(conn, "b")
    await finish(conn, "free", note="")
    await finish(other, "c")
    shown = await other.journal("gw")
    assert shown.owners == ("r1",)
    assert [(entry.request_id, entry.note) for entry in shown.entries] == [("a", NOTE), ("b", NOTE)]
    assert await known(other, "gw") == {"a": ((5, 4, 0), False), "b": ((5, 4, 0), False)}
    assert await known(other, "") == dict.fromkeys("abc", ((5, 4, 0), False))
    conn.acknowledge(["a", "c", "unknown"])  # c is not its own
    await asyncio.sleep(0.3)
    assert (await known(other, "")).keys() == {"b", "c"}
    conn.acknowledge(["b", "c"], foreign=True)
    await asyncio.sleep(0.3)
    assert await known(other, "") == {}


async def test_what_a_gateway_was_told_is_written(room: Room, tmp_path: Path) -> None:
    conn = await room.connect(replica(room, tmp_path, "r1", tokens_per_s=500), gateway_id="gw")
    told = 0
    async with aclosing(conn.generate(request(request_id="a", note=NOTE, max_tokens=50))) as stream:
        async for ready in stream:
            told += sum(len(chunk.token_ids) for chunk in ready)
            (entry,) = read_folder(tmp_path, "gw")
            assert entry.completion_tokens >= told
    assert entry.outcome is Outcome.FINISHED
    assert told == 50


async def test_what_a_lost_gateway_asked_for_ends_with_what_was_made(room: Room, tmp_path: Path) -> None:
    server = replica(room, tmp_path, "r1", tokens_per_s=200)
    lost, heir = await room.connect(server, gateway_id="gw"), await room.connect(server, gateway_id="heir")
    async with aclosing(lost.generate(request(request_id="a", note=NOTE, max_tokens=1000))) as stream:
        await anext(stream)
        (usage, running) = (await known(heir, "gw"))["a"]
        assert running
        assert usage[1] >= 1
        lost._sockets.close()  # as the end of its process does: nothing is said
        for descriptor in lost._watched:
            lost._loop.remove_reader(descriptor)

        async def ended() -> tuple[int, int, int]:
            while True:
                usage, running = (await known(heir, "gw"))["a"]
                if not running:
                    return usage
                await asyncio.sleep(0.01)

        usage = await asyncio.wait_for(ended(), 3)
        lost._closed.set()
    assert usage == (5, room.engines[0].stats().generation_tokens, 0)


async def test_a_living_replica_takes_over_from_a_dead_one_and_says_so(room: Room, tmp_path: Path) -> None:
    dead = replica(room, tmp_path, "r1")
    conn = await room.connect(dead, gateway_id="gw")
    heir = replica(room, tmp_path, "r2")
    await finish(conn, "a")
    await asyncio.to_thread(dead.stop)
    asking = await room.connect(heir, gateway_id="asking")
    assert (await asking.journal("gw")).owners == ("r2",)
    await asyncio.to_thread(heir.adopt)
    shown = await asking.journal("gw")
    assert shown.owners == ("r2", "r1")
    assert [entry.request_id for entry in shown.entries] == ["a"]


async def test_a_replica_without_a_journal_answers_for_nobody(room: Room) -> None:
    conn = await room.connect(room.replica(), gateway_id="gw")
    await finish(conn, "a")
    assert await conn.journal("gw") == Journaled((), ())


def test_a_long_answer_comes_in_pages(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r1")
    for number in range(4_500):
        journal.begin("gw", f"r{number}", 8, NOTE)
    pages = list(Recorder(journal).pages(JournalAsk(7, "gw")))
    assert [len(page.entries) for page in pages] == [2_000, 2_000, 500]
    assert [page.last for page in pages] == [False, False, True]
    assert {page.nonce for page in pages} == {7}
    journal.close()


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no journal can be kept in"):
        Journal(tmp_path / "file", "r1")


def test_what_it_took_over_outlives_rewriting_and_its_own_death(tmp_path: Path) -> None:
    Journal(tmp_path, "r1").close()
    heir = Journal(tmp_path, "r2", JournalLimits(bytes=200))
    for number in range(10):
        heir.begin("gw", f"r{number}", 8, NOTE)
        heir.end(f"r{number}")
        heir.acknowledge([f"r{number}"])
        heir.flush()
    heir.close()
    last = Journal(tmp_path, "r3")
    assert last.owners("gw") == ("r3", "r1", "r2")
    assert len(last) == 0
    last.close()
    assert [path.name for path in tmp_path.iterdir()] == ["r3.journal"]


async def test_acknowledged_requests_leave_the_file_bounded(room: Room, tmp_path: Path) -> None:
    server = replica(room, tmp_path, "r1")
    conn = await room.connect(server, gateway_id="gw")
    for number in range(20):
        await finish(conn, f"r{number}")
        conn.acknowledge([f"r{number}"])
    await eventually(lambda: not conn._journaled)
    await asyncio.sleep(0.3)
    assert await known(conn, "") == {}
