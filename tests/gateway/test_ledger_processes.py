"""Gateways as processes: together they pass no cap; killed ones leave nothing reserved, nothing charged twice."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from gateway.db.database import open_engine
from gateway.ledger.transaction import Journaled
from gateway.ledger.usage import totals
from policies.budget import Window
from replicas.journal import read_folder
from replicas.journal_records import Outcome
from tests.gateway import ledger_worker
from tests.gateway.ledger_worker import MOST, PROMPT, made
from tests.gateway.ledgers import BACKENDS, accounts, new_database, running, spend, standing

COST = spend("x", PROMPT, MOST).most_usd
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.gateway.ledger_worker"])


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, tmp_path)


class Watch:
    """Looks at the accounts all the time, as another client of the database, and counts breaches of a cap."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.looks = 0
        self.breaches: list[Any] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._engine.dispose()

    def _run(self) -> None:
        query = text(
            "SELECT spent_usd, reserved_usd, cap_usd, spent_tokens, reserved_tokens, cap_tokens FROM ledger_accounts"
        )
        while not self._done.is_set():
            with self._engine.begin() as connection:
                rows = connection.execute(query).all()
            self.looks += 1
            self.breaches += [row for row in rows if row[2] is not None and row[0] + row[1] > row[2]]
            self.breaches += [row for row in rows if row[5] is not None and row[3] + row[4] > row[5]]
            time.sleep(0.001)


@contextmanager
def process(target: Any, *args: Any) -> Iterator[tuple[Any, Any]]:
    """(the process, our end of its pipe); killed at the end if it still runs."""
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=target, args=(*args, theirs))
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join()
        child.close()
        ours.close()


@pytest.mark.parametrize("kind", ["usd", "tokens"])
def test_four_processes_are_granted_exactly_what_the_budget_allows(url: str, kind: str) -> None:
    """4 x 50 reservations at once against a budget for 50, each used up whole."""
    open_engine(url).dispose()
    cap = {"usd": 50 * COST} if kind == "usd" else {"tokens": 50 * (PROMPT + MOST)}
    workers = [process(ledger_worker.grab, url, f"gw-{n}", accounts(Window.TOTAL, **cap), 50) for n in range(4)]
    with Watch(url) as watch, workers[0] as a, workers[1] as b, workers[2] as c, workers[3] as d:
        pipes = [pipe for _, pipe in (a, b, c, d)]
        assert [pipe.recv() for pipe in pipes] == ["ready"] * 4
        for pipe in pipes:
            pipe.send("go")
        answers = [pipe.recv() for pipe in pipes]
        assert sum(granted for granted, _ in answers) == 50
        assert [failures for _, failures in answers] == [[]] * 4
        assert standing(url)[0].reserved_usd == 50 * COST
        for pipe in pipes:
            pipe.send("use them up")
        assert [pipe.recv() for pipe in pipes] == ["done"] * 4
    assert watch.breaches == []
    assert watch.looks > 5
    (after,) = standing(url)
    assert (after.spent_usd, after.reserved_usd, after.overrun_usd) == (50 * COST, 0, 0)


async def _take_over(url: str, dead: str, journaled: Journaled) -> None:
    """By two gateways at the same time, as soon as the lease is over."""
    async with running(url, f"heir-1-of-{dead}") as one, running(url, f"heir-2-of-{dead}") as two:
        deadline = time.monotonic() + 10
        while dead not in await one.dead():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        await asyncio.gather(*(each.take_over(dead, journaled, complete=False) for each in (one, two)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(10))
def test_a_killed_gateway_leaves_nothing_reserved_and_nothing_charged_twice(
    backend: str, seed: int, tmp_path: Path
) -> None:
    """kill -9 at a random moment; every second time the journal is lost too."""
    url = new_database(backend, tmp_path)
    open_engine(url).dispose()
    name, folder, dice = f"gw-{seed}", tmp_path / "journal", random.Random(seed)
    with process(ledger_worker.serve, url, name, accounts(Window.TOTAL, usd=10**12), folder) as (child, pipe):
        assert pipe.recv() == "ready"
        time.sleep(dice.uniform(0, 0.08))
        child.kill()
        child.join()
    entries = {entry.request_id: entry for entry in read_folder(folder, name)}
    assert entries
    if seed % 2:
        shutil.rmtree(folder)
        journaled = {}
    else:
        journaled = {id: (entry.usage, entry.note) for id, entry in entries.items()}
    asyncio.run(_take_over(url, name, journaled))

    engine = create_engine(url)
    with engine.begin() as connection:
        rows = connection.execute(text("SELECT * FROM ledger_requests")).all()
        total = totals(connection)
    engine.dispose()
    assert rows
    assert {row.state for row in rows} <= {"settled", "released"}
    for row in rows:
        _check(row, entries.get(row.id), lost=bool(seed % 2))
    (account,) = standing(url)
    assert (account.reserved_usd, account.reserved_tokens) == (0, 0)
    assert account.spent_usd == sum(row.cost_usd for row in rows) == sum(each.cost_usd for each in total)
    tokens = sum(row.prompt_tokens + row.completion_tokens for row in rows if row.state == "settled")
    assert account.spent_tokens == tokens


def _check(row: Any, entry: Any, *, lost: bool) -> None:
    """One request of a killed gateway: settled by itself, from its journal, or as reserved and marked."""
    if row.source == "gateway":
        assert (row.completion_tokens, row.estimated) == (made(row.id), 0)
    elif lost or entry is None:
        assert (row.source, row.estimated, row.cost_usd, row.completion_tokens) == ("reserved", 1, COST, MOST)
    elif entry.outcome is Outcome.FINISHED:
        assert (row.source, row.estimated, row.completion_tokens) == ("journal", 0, made(row.id))
    else:
        assert row.completion_tokens == entry.completion_tokens <= made(row.id)
        assert row.source == "journal"
        assert row.cost_usd == (PROMPT * 10 + entry.completion_tokens * 100 if entry.completion_tokens else 0)
