"""Gateways as processes of their own, for tests that need several, or that kill them."""

from __future__ import annotations

import asyncio
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

from gateway.db.database import Database
from gateway.ledger.entries import Reservation
from gateway.ledger.ledger import Ledger, LedgerSettings
from policies.budget import Account
from replicas.journal import Journal, JournalLimits
from replicas.protocol import BudgetExceeded, Usage
from tests.gateway.ledgers import spend

PROMPT, MOST = 10, 40


def made(request_id: str) -> int:
    """How many tokens a finished request has: 1 to MOST, from its name alone, so that a test can tell."""
    return zlib.crc32(request_id.encode()) % MOST + 1


def grab(url: str, name: str, accounts: tuple[Account, ...], count: int, pipe: Connection) -> None:
    """Ask for `count` reservations at once when told, send how many were granted, use them up when told again."""

    async def run() -> None:
        database = Database(url)
        # small transactions, many of them, so that those of different processes meet
        ledger = Ledger(database, name, settings=LedgerSettings(batch=2))
        await ledger.start()
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        asked = [ledger.reserve(spend(f"{name}-{n}", PROMPT, MOST), accounts) for n in range(count)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        granted = [answer for answer in answers if isinstance(answer, Reservation)]
        others = [answer for answer in answers if not isinstance(answer, Reservation | BudgetExceeded)]
        pipe.send((len(granted), [repr(other) for other in others]))
        await asyncio.to_thread(pipe.recv)
        usage = Usage(prompt_tokens=PROMPT, completion_tokens=MOST)
        assert all(await asyncio.gather(*(ledger.settle(reservation, usage) for reservation in granted)))
        await ledger.aclose()
        database.close()
        pipe.send("done")

    asyncio.run(run())


def serve(url: str, name: str, accounts: tuple[Account, ...], folder: Path, pipe: Connection) -> None:
    """Serve requests until killed, several at a time, with a replica in the same process that keeps a journal."""

    async def answer(ledger: Ledger, journal: Journal, request_id: str, budgets: tuple[Account, ...]) -> None:
        reservation = await ledger.reserve(spend(request_id, PROMPT, MOST), budgets)
        await asyncio.sleep(0)
        journal.begin(name, request_id, PROMPT)
        for token in range(made(request_id)):
            journal.progress(request_id, 1)
            if token % 4 == 0:
                journal.flush()
                await asyncio.sleep(0)
        usage = Usage(prompt_tokens=PROMPT, completion_tokens=made(request_id))
        journal.end(request_id, usage)
        journal.flush()
        await asyncio.sleep(0)
        ledger.settle(reservation, usage)

    async def worker(ledger: Ledger, journal: Journal, number: int) -> None:
        count = 0
        while True:
            count += 1
            await answer(ledger, journal, f"{name}-{number}-{count}", accounts)
            if count == 3:
                pipe.send("ready")

    async def run() -> None:
        ledger = Ledger(Database(url), name, settings=LedgerSettings(lease_s=0.4))
        await ledger.start()
        journal = Journal(folder, name, JournalLimits(progress_s=0.0))
        await asyncio.gather(*(worker(ledger, journal, number) for number in range(8)))

    asyncio.run(run())
