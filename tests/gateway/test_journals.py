"""What a dead gateway left, as another one closes it with the replicas' journals over real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from gateway.journals import ReplicaJournals
from gateway.ledger.entries import Reservation, note
from gateway.ledger.ledger import Ledger
from gateway.ledger.recovery import Recovery
from gateway.ledger.usage import totals
from replicas.client import ReplicaConnection
from replicas.fake import FakeSettings
from replicas.protocol import GenerateRequest, SamplingParams, Usage
from tests.gateway.conftest import Replica
from tests.gateway.ledgers import ALICE, Clock, accounts, running, spend, standing


class Fleet:
    """Just the connections."""

    def __init__(self) -> None:
        self.connections: list[ReplicaConnection] = []


class Scene:
    """Two replicas that keep journals, a gateway that is going to die, and its heir. Time is virtual."""

    def __init__(self, folder: Path, dead: Ledger, heir: Ledger, clock: Clock) -> None:
        self.folder, self.dead, self.heir, self.clock = folder, dead, heir, clock
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        settings = FakeSettings(tokens_per_s=1000)
        self.replicas = [Replica.start(settings, name, journals=folder / "journals") for name in ("r1", "r2")]
        self.fleet = Fleet()
        self.connections: list[ReplicaConnection] = []
        self.journals = ReplicaJournals(self.fleet, heir, {"elsewhere"})  # type: ignore[arg-type]
        self.recovery = Recovery(heir, self.journals)

    async def connect(self) -> None:
        for replica in self.replicas:
            await self.dead.link(replica.server.address.incarnation)
            self.connections.append(await ReplicaConnection.connect(replica.server.address, gateway_id="gw-1"))
            self.fleet.connections.append(await ReplicaConnection.connect(replica.server.address, gateway_id="gw-2"))

    async def ask(
        self, id: str, replica: int, *, tokens: int = 5, take: int | None = None, model: str = "model"
    ) -> Reservation:
        """Reserve for it, and have it answered (up to `take` tokens), but never settle."""
        cost = spend(id, 3, 50)
        held = await self.dead.reserve(cost, accounts(usd=10**6))
        sampling = SamplingParams(max_tokens=tokens)
        request = GenerateRequest(request_id=id, prompt_token_ids=(1, 2, 3), sampling=sampling, note=note(cost))
        count = 0
        async with aclosing(self.connections[replica].generate(request)) as stream:
            async for ready in stream:
                count += sum(len(chunk.token_ids) for chunk in ready)
                if take is not None and count >= take:
                    break
        return held

    async def die(self) -> None:
        """Its connections break, its lease runs out."""
        for connection in self.connections:
            await connection.aclose()
        self.dead._open.clear()
        self.clock.now += 11
        await self.heir.renew()

    async def lose(self, replica: int) -> None:
        await self.fleet.connections.pop(replica).aclose()
        await asyncio.to_thread(self.replicas[replica].server.stop)

    def rows(self) -> dict[str, tuple[str, str, int, int]]:
        """(state, source, generated tokens, estimated) by id."""
        engine = create_engine(self.url)
        with engine.begin() as connection:
            found = connection.execute(text("SELECT * FROM ledger_requests")).all()
        engine.dispose()
        return {row.id: (row.state, row.source, row.completion_tokens, row.estimated) for row in found}

    async def compare(self) -> None:
        """Journals with books, twice, as two gateways would, once no engine runs; acknowledgements arrive."""
        async with asyncio.timeout(5):
            while not all(replica.idle() for replica in self.replicas):
                await asyncio.sleep(0.005)
        for connection in (*self.fleet.connections, *self.fleet.connections):
            await self.journals.tidy(connection)
        await asyncio.sleep(0.3)

    def unbilled(self) -> dict[str, int]:
        """By id; asserts that the totals say the same."""
        engine = create_engine(self.url)
        with engine.begin() as connection:
            found = connection.execute(text("SELECT id, unbilled_tokens FROM ledger_requests")).all()
            total = sum(one.unbilled_tokens for one in totals(connection))
        engine.dispose()
        assert total == sum(row.unbilled_tokens for row in found)
        return {row.id: row.unbilled_tokens for row in found}

    async def aclose(self) -> None:
        for connection in (*self.connections, *self.fleet.connections):
            await connection.aclose()
        for replica in self.replicas:
            await asyncio.to_thread(replica.server.stop)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    clock, url = Clock(), f"sqlite:///{tmp_path / 'ledger.db'}"
    async with running(url, "gw-1", clock) as dead, running(url, "gw-2", clock) as heir:
        scene = Scene(tmp_path, dead, heir, clock)
        try:
            await scene.connect()
            yield scene
        finally:
            await scene.aclose()


async def test_every_token_is_billed_and_what_never_ran_is_released(scene: Scene) -> None:
    await scene.ask("whole", 0, tokens=7)
    await scene.ask("cut", 1, tokens=1000, take=3)
    await scene.dead.reserve(spend("waiting", 3, 50), accounts(usd=10**6))
    await scene.die()
    await scene.recovery.look()
    made = scene.replicas[1].engine.stats().generation_tokens
    assert scene.rows() == {
        "whole": ("settled", "journal", 7, 0),
        "cut": ("settled", "journal", made, 0),
        "waiting": ("released", "journal", 0, 0),
    }
    (after,) = standing(scene.url)
    assert (after.reserved_usd, after.reserved_tokens, after.spent_tokens) == (0, 0, 3 + 7 + 3 + made)
    await asyncio.sleep(0.3)
    assert [(await one.journal("")).entries for one in scene.fleet.connections] == [(), ()]


async def test_a_journal_that_is_missing_is_waited_for_and_then_its_requests_are_charged(scene: Scene) -> None:
    await scene.ask("known", 0)
    await scene.ask("lost", 1)
    await scene.die()
    await scene.lose(1)
    for file in (scene.folder / "journals").glob("r2-*"):
        file.unlink()
    await scene.recovery.look()
    assert {row[0] for row in scene.rows().values()} == {"open"}
    scene.clock.now += 10
    await scene.heir.renew()
    await scene.recovery.look()
    assert scene.rows() == {"known": ("settled", "journal", 5, 0), "lost": ("settled", "reserved", 50, 1)}


async def test_a_replica_that_took_over_the_missing_journal_answers_for_it(scene: Scene) -> None:
    await scene.ask("lost", 1)
    await scene.die()
    await scene.lose(1)
    await asyncio.to_thread(scene.replicas[0].server.adopt)
    await scene.recovery.look()
    assert scene.rows() == {"lost": ("settled", "journal", 5, 0)}


async def test_what_went_to_an_upstream_is_charged_as_reserved(scene: Scene) -> None:
    """No journal of ours knows of it, so that none mentions it says nothing."""
    subject = type(ALICE)(ALICE.key, ALICE.team, "elsewhere")
    await scene.dead.reserve(spend("upstream", 3, 50, subject=subject), accounts(usd=10**6))
    await scene.die()
    await scene.recovery.look()
    assert scene.rows() == {"upstream": ("settled", "reserved", 50, 1)}


async def test_a_link_is_taken_back_when_nothing_is_open_that_was_open_when_the_replica_went(scene: Scene) -> None:
    gone, stays = (replica.server.address.incarnation for replica in scene.replicas)
    reservation = await scene.dead.reserve(spend("open", 3, 50), accounts(usd=10**6))
    scene.dead.unlink(gone)
    await scene.dead.renew()
    assert await scene.heir.links("gw-1") == {gone, stays}
    await scene.dead.release(reservation)
    await scene.dead.renew()
    assert await scene.heir.links("gw-1") == {stays}
    await scene.dead.link(gone)
    assert await scene.heir.links("gw-1") == {gone, stays}


async def test_a_gateway_that_slept_notes_its_links_anew(scene: Scene) -> None:
    links = await scene.heir.links("gw-1")
    assert len(links) == 2
    scene.clock.now += 11
    await scene.heir.renew()
    await scene.recovery.look()
    assert await scene.heir.links("gw-1") == set()
    awake: Any = await scene.dead.reserve(spend("again", 3, 50), accounts(usd=10**6))
    assert await scene.heir.links("gw-1") == links
    await scene.dead.release(awake)


async def test_what_was_made_and_did_not_come_is_noted_once_and_charged_to_nobody(scene: Scene) -> None:
    held = await scene.ask("cut", 1, tokens=1000, take=3)
    await scene.dead.settle(held, Usage(prompt_tokens=3, completion_tokens=3), cut=True)
    await scene.compare()
    made = scene.replicas[1].engine.stats().generation_tokens
    assert made >= 3
    assert scene.rows() == {"cut": ("settled", "compared", 3, 0)}
    assert scene.unbilled() == {"cut": made - 3}
    (after,) = standing(scene.url)
    assert (after.spent_tokens, after.reserved_tokens) == (6, 0)
    assert [(await one.journal("")).entries for one in scene.fleet.connections] == [(), ()]


async def test_of_a_replica_that_died_the_one_that_took_its_journal_over_tells(scene: Scene) -> None:
    held = await scene.ask("begun again", 1, tokens=20, take=20)
    await scene.lose(1)
    await scene.dead.release(held, unbilled=4, cut=True)
    await scene.compare()
    assert scene.unbilled() == {"begun again": 4}
    assert scene.rows() == {"begun again": ("released", "cut", 0, 0)}, "marked as long as no journal has told"
    await asyncio.to_thread(scene.replicas[0].server.adopt)
    await scene.compare()
    assert scene.unbilled() == {"begun again": 20}
    assert scene.rows() == {"begun again": ("released", "compared", 0, 0)}


async def test_an_ending_that_is_known_is_not_compared(scene: Scene) -> None:
    """What a replica has told to the end stands, and so does a request that is still open."""
    held = await scene.ask("told", 0, tokens=7)
    await scene.ask("open", 0, tokens=7)
    await scene.dead.settle(held, Usage(prompt_tokens=3, completion_tokens=7))
    await scene.compare()
    assert scene.rows() == {"told": ("settled", "gateway", 7, 0), "open": ("open", "", 0, 0)}
    assert scene.unbilled() == {"told": 0, "open": 0}
    assert [entry.request_id for entry in (await scene.fleet.connections[0].journal("")).entries] == ["open"]
