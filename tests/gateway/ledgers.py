"""What the tests of the ledger share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

from gateway.db.database import Database
from gateway.ledger.entries import Spend
from gateway.ledger.ledger import Ledger, LedgerSettings
from gateway.ledger.usage import Standing, standings
from load.postgres import shared
from policies.budget import Account, Budget, Budgets, Price, Scope, Subject, Window
from replicas.protocol import Usage

BACKENDS = ("sqlite", "postgresql")
ALICE = Subject("alice", "team", "model")
# a token of the prompt costs 10 and one of the completion 100, so that mixing them up shows
PRICE = Price(input=10, cached_input=1, output=100)
USED = Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=4)


def new_database(backend: str, folder: Path) -> str:
    return f"sqlite:///{folder / 'ledger.db'}" if backend == "sqlite" else shared().new_database()


def spend(request_id: str, prompt: int = 10, most: int = 10, **changes: Any) -> Spend:
    given = {"subject": ALICE, "price": PRICE, **changes}
    return Spend(request_id=request_id, prompt_tokens=prompt, max_tokens=most, **given)


def accounts(window: Window = Window.DAY, **caps: Any) -> tuple[Account, ...]:
    """One budget for alice."""
    return Budgets((Budget(scope=Scope(key="alice"), window=window, **caps),)).accounts(ALICE)


class Clock:
    """Virtual time, from a fixed moment in the middle of a day."""

    def __init__(self) -> None:
        self.now = 1_795_521_630.0  # 2026-11-24 12:00:30 UTC

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(
    url: str, gateway_id: str = "gw-1", clock: Clock | None = None, **settings: Any
) -> AsyncGenerator[Ledger, None]:
    """A started ledger with a database of its own; asserts that nothing leaked."""
    database = Database(url)
    given = {"clock": clock} if clock else {}
    ledger = Ledger(database, gateway_id, settings=LedgerSettings(**settings), **given)
    try:
        await ledger.start()
        yield ledger
    finally:
        await ledger.aclose()
        database.close()


def standing(url: str, now: float = 0.0) -> list[Standing]:
    engine = create_engine(url)  # the schema is there: no need to look
    try:
        with engine.begin() as connection:
            return standings(connection, now)
    finally:
        engine.dispose()
