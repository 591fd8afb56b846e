"""The ledger of one or several gateways, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from gateway.db.database import Database
from gateway.errors import error_headers, http_error
from gateway.ledger.entries import Reservation, note
from gateway.ledger.ledger import Ledger, LedgerSettings
from gateway.ledger.recovery import Journals, Recovery
from gateway.ledger.usage import request as request_rows
from gateway.ledger.usage import totals
from policies.budget import Budget, Budgets, Scope, Window
from replicas.protocol import BudgetExceeded, InvalidRequest, ReplicaLost, Unavailable, Usage
from tests.gateway.ledgers import ALICE, BACKENDS, USED, Clock, accounts, new_database, running, spend, standing

MOST = spend("x").most_usd


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return new_database("sqlite", tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_settling_charges_what_was_used_and_gives_back_the_rest(url: str) -> None:
    async with running(url) as ledger:
        reservation = await ledger.reserve(spend("a"), accounts(usd=10**6))
        (held,) = standing(url)
        assert (held.spent_usd, held.reserved_usd, held.reserved_tokens) == (0, MOST, 20)
        assert await ledger.settle(reservation, USED)
        (after,) = standing(url)
        assert (after.spent_usd, after.spent_tokens, after.reserved_usd) == (6 * 10 + 4 * 1 + 3 * 100, 13, 0)
        assert ledger.open == 0


async def test_a_second_end_changes_nothing(url: str) -> None:
    async with running(url) as ledger:
        reservation = await ledger.reserve(spend("a"), accounts(usd=10**6))
        ends = [ledger.settle(reservation, USED), ledger.release(reservation), ledger.settle(reservation, USED)]
        assert await asyncio.gather(*ends) == [True, False, False]
        assert standing(url)[0].spent_tokens == 13


async def test_of_two_budgets_both_are_reserved_or_none(url: str) -> None:
    wide, narrow = (Scope(key="alice"), 10**9), (Scope(team="team"), MOST)
    both = Budgets(tuple(Budget(scope=s, window=Window.DAY, usd=usd) for s, usd in (wide, narrow))).accounts(ALICE)
    async with running(url) as ledger:
        first = await ledger.reserve(spend("a"), both)
        with pytest.raises(BudgetExceeded, match="team 'team'"):
            await ledger.reserve(spend("b"), both)
        assert [each.reserved_usd for each in standing(url)] == [MOST, MOST]
        await ledger.release(first)


async def test_what_was_given_back_can_be_had_at_once(url: str) -> None:
    async with running(url) as ledger:
        for number in range(20):
            reservation = await ledger.reserve(spend(f"r{number}"), accounts(usd=MOST + 19 * 364))
            ledger.settle(reservation, USED)  # not awaited: the next reservation comes after it all the same


async def test_a_refusal_says_when_the_window_ends(sqlite: str, clock: Clock) -> None:
    async with running(sqlite, clock=clock) as ledger:
        await ledger.reserve(spend("a"), accounts(Window.MINUTE, usd=MOST))
        with pytest.raises(BudgetExceeded) as refused:
            await ledger.reserve(spend("b"), accounts(Window.MINUTE, usd=MOST))
        assert refused.value.retry_after_s == 30
        row = http_error(refused.value)
        assert (row.status, row.code) == (429, "insufficient_quota")
        assert (b"retry-after", b"30") in error_headers(refused.value)
        clock.now += 30
        await ledger.reserve(spend("c"), accounts(Window.MINUTE, usd=MOST))


@pytest.mark.parametrize(("window", "cap"), [(Window.TOTAL, MOST - 1), (Window.MINUTE, MOST - 1)])
async def test_a_refusal_that_time_does_not_mend_names_none(sqlite: str, window: Window, cap: int) -> None:
    async with running(sqlite) as ledger:
        with pytest.raises(BudgetExceeded) as refused:
            await ledger.reserve(spend("a"), accounts(window, usd=cap))
        assert refused.value.retry_after_s is None


async def test_a_reservation_charges_the_window_it_began_in(url: str, clock: Clock) -> None:
    async with running(url, clock=clock) as ledger:
        began = await ledger.reserve(spend("a"), accounts(Window.MINUTE, tokens=20))
        clock.now += 31
        later = await ledger.reserve(spend("b"), accounts(Window.MINUTE, tokens=20))
        await ledger.settle(began, USED)
        rows = {each.starts % 3600: (each.spent_tokens, each.reserved_tokens) for each in standing(url)}
        assert rows == {0: (13, 0), 60: (0, 20)}
        await ledger.release(later)


async def test_more_than_was_reserved_is_charged_and_noted(url: str) -> None:
    async with running(url) as ledger:
        reservation = await ledger.reserve(spend("a"), accounts(usd=MOST, tokens=20))
        await ledger.settle(reservation, Usage(prompt_tokens=10, completion_tokens=15))
        (after,) = standing(url)
        assert (after.spent_usd, after.overrun_usd) == (MOST + 500, 500)
        assert (after.spent_tokens, after.overrun_tokens) == (25, 5)


class Counting(Database):
    """A database that counts its transactions and can be told to fail."""

    writes = 0
    failing = False

    async def write(self, change: Callable[[Connection], Any]) -> Any:
        if self.failing:
            raise OperationalError("BEGIN", None, Exception("the database is away"))
        self.writes += 1
        return await super().write(change)


async def test_what_arrives_together_is_committed_together(url: str) -> None:
    database = Counting(url)
    ledger = Ledger(database, "gw-1")
    await ledger.start()
    before = database.writes
    reservations = await asyncio.gather(*(ledger.reserve(spend(f"r{n}"), accounts(usd=10**9)) for n in range(200)))
    assert all(await asyncio.gather(*(ledger.settle(reservation, USED) for reservation in reservations)))
    assert database.writes - before <= 6
    await ledger.aclose()
    database.close()


async def test_without_a_budget_nothing_is_written_before_the_answer(url: str) -> None:
    database = Counting(url)
    ledger = Ledger(database, "gw-1", settings=LedgerSettings(record_s=0.05))
    await ledger.start()
    before = database.writes
    reservations = [await ledger.reserve(spend(f"r{n}")) for n in range(50)]
    answers = [ledger.settle(reservation, USED) for reservation in reservations]
    assert database.writes == before
    assert all(await asyncio.gather(*answers))
    assert database.writes == before + 1
    (total,) = await database.read(totals)
    assert (total.key, total.model, total.requests, total.completion_tokens) == ("alice", "model", 50, 150)
    assert total.cost_usd == 50 * 364
    await ledger.aclose()
    database.close()


async def test_usage_that_waits_is_written_at_the_end(sqlite: str) -> None:
    async with running(sqlite, record_s=60.0) as ledger:
        ledger.settle(await ledger.reserve(spend("a")), USED)
    database = Database(sqlite)
    assert (await database.read(totals))[0].requests == 1
    assert await database.read(lambda c: c.exec_driver_sql("SELECT COUNT(*) FROM ledger_gateways").scalar()) == 0
    database.close()


async def test_a_database_that_is_away_refuses_and_forgets_nothing(url: str) -> None:
    database = Counting(url)
    ledger = Ledger(database, "gw-1", settings=LedgerSettings(retry_s=0.01))
    await ledger.start()
    reservation = await ledger.reserve(spend("a"), accounts(usd=10**6))
    database.failing = True
    settled = ledger.settle(reservation, USED)
    with pytest.raises(Unavailable):
        await ledger.reserve(spend("b"), accounts(usd=10**6))
    assert not settled.done()
    database.failing = False
    assert await settled
    assert standing(url)[0].spent_tokens == 13
    await ledger.aclose()
    database.close()


async def test_a_request_that_cannot_be_done_spoils_no_other(url: str) -> None:
    async with running(url) as ledger:
        first = await ledger.reserve(spend("same"), accounts(usd=10**9))
        results = await asyncio.gather(
            *(ledger.reserve(spend(id), accounts(usd=10**9)) for id in ("a", "same", "b")), return_exceptions=True
        )
        assert [isinstance(result, InvalidRequest) for result in results] == [False, True, False]
        assert standing(url)[0].reserved_usd == 3 * MOST
        for reservation in (first, results[0], results[2]):
            assert isinstance(reservation, Reservation)
            assert await ledger.release(reservation)


async def test_amounts_beyond_the_database_spoil_no_other(sqlite: str) -> None:
    async with running(sqlite) as ledger:
        huge = ledger.reserve(spend("huge", most=2**62), accounts(tokens=2**61 - 1))
        results = await asyncio.gather(huge, ledger.reserve(spend("a"), accounts(usd=10**9)), return_exceptions=True)
        assert isinstance(results[0], BudgetExceeded)
        assert isinstance(results[1], Reservation)


@pytest.mark.parametrize("turns", range(6))
async def test_a_caller_who_leaves_holds_nothing(sqlite: str, turns: int) -> None:
    """Cancelled after any number of the loop's turns: before, within and after the transaction."""
    async with running(sqlite) as ledger:
        await ledger.reserve(spend("first"), accounts(usd=10**9))
        for number in range(8):
            asking = asyncio.create_task(ledger.reserve(spend(f"r{number}"), accounts(usd=10**9)))
            for _ in range(turns):
                await asyncio.sleep(0.0005 if turns > 3 else 0)
            asking.cancel()
            answer = (await asyncio.gather(asking, return_exceptions=True))[0]
            if isinstance(answer, Reservation):
                ledger.release(answer)
        last = await ledger.reserve(spend("last"), accounts(usd=10**9))
        await ledger.release(last)
        await asyncio.sleep(0.02)
        assert ledger.open == 1
        assert standing(sqlite)[0].reserved_usd == MOST


# ---------------------------------------------------------------- leases


async def test_a_gateway_that_lives_is_not_taken_over(url: str) -> None:
    async with running(url, "gw-1", lease_s=0.3) as first, running(url, "gw-2") as second:
        reservation = await first.reserve(spend("a"), accounts(usd=10**6))
        await asyncio.sleep(0.5)  # longer than the lease: it was renewed
        assert await second.dead() == []
        assert await second.take_over("gw-1", {}, complete=False) is None
        assert await first.settle(reservation, USED)


async def test_a_gateway_that_comes_back_too_late_settles_nothing(url: str, clock: Clock) -> None:
    async with running(url, "gw-1", clock) as paused, running(url, "gw-2", clock) as other:
        reservation = await paused.reserve(spend("a"), accounts(usd=10**6))
        clock.now += 11
        assert "gw-1" in await other.dead()
        taken = await other.take_over("gw-1", {"a": (USED, "")}, complete=False)
        assert taken is not None
        assert taken.settled == 1
        assert not await paused.settle(reservation, Usage(prompt_tokens=10, completion_tokens=10))
        assert standing(url)[0].spent_tokens == 13
        again = await paused.reserve(spend("b"), accounts(usd=10**6))
        assert "gw-1" not in await other.dead(), "a reservation was made without a lease over it"
        await paused.release(again)


async def test_without_a_journal_the_reservation_is_charged_and_marked(url: str, clock: Clock) -> None:
    async with running(url, "gw-1", clock) as dead, running(url, "gw-2", clock) as other:
        await dead.reserve(spend("a"), accounts(usd=10**6))
        clock.now += 11
        both = await asyncio.gather(
            other.take_over("gw-1", {}, complete=False), other.take_over("gw-1", {}, complete=False)
        )
        assert [taken and taken.charged for taken in both] == [1, 0]
        (after,) = standing(url)
        assert (after.spent_usd, after.reserved_usd, after.spent_tokens) == (MOST, 0, 20)
        database = Database(url)
        (row,) = await database.read(lambda connection: request_rows(connection, "a"))
        assert (row.state, row.estimated, row.source, row.cost_usd) == ("settled", 1, "reserved", MOST)
        database.close()
        dead._open.clear()


class Source:
    """Journals as a test writes them; an exception stands for journals that cannot be read."""

    def __init__(self, *answers: Journals | Exception) -> None:
        self.answers = list(answers)
        self.acknowledged: list[str] = []

    async def read(self, gateway_id: str) -> Journals:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def acknowledge(self, gateway_id: str, request_ids: Any) -> None:
        self.acknowledged += request_ids


@pytest.mark.parametrize("first", [ReplicaLost("gone"), Journals(complete=True, running=True), Journals()])
async def test_journals_that_are_not_final_are_waited_for(
    sqlite: str, clock: Clock, first: Journals | Exception
) -> None:
    async with running(sqlite, "gw-1", clock) as dead, running(sqlite, "gw-2", clock) as other:
        await dead.reserve(spend("a"), accounts(usd=10**6))
        clock.now += 11
        await other.renew()
        source = Source(first, Journals(usages={"a": (USED, "")}, complete=True))
        recovery = Recovery(other, source, patience_s=5.0)
        await recovery.look()
        assert standing(sqlite)[0].reserved_usd == MOST
        await recovery.look()
        assert standing(sqlite)[0].spent_tokens == 13
        assert source.acknowledged == ["a"]
        dead._open.clear()


async def test_patience_ends(sqlite: str, clock: Clock) -> None:
    async with running(sqlite, "gw-1", clock) as dead, running(sqlite, "gw-2", clock) as other:
        await dead.reserve(spend("a"), accounts(usd=10**6))
        clock.now += 11
        await other.renew()
        recovery = Recovery(other, Source(ReplicaLost("gone")), patience_s=5.0)
        await recovery.look()
        clock.now += 5
        await recovery.look()
        (after,) = standing(sqlite)
        assert (after.reserved_usd, after.spent_usd) == (0, MOST)
        dead._open.clear()


async def test_usage_without_a_reservation_survives_its_gateway(url: str, clock: Clock) -> None:
    """What the dead gateway had recorded is not recorded again; what it had not, is, for the right payer."""
    async with running(url, "gw-1", clock, record_s=60.0) as dead, running(url, "gw-2", clock) as other:
        written = dead.settle(await dead.reserve(spend("written")), USED)
        dead._flush_records()
        assert await written
        lost = await dead.reserve(spend("lost"))
        clock.now += 11
        text = note(lost.spend)
        taken = await other.take_over("gw-1", {"written": (USED, text), "lost": (USED, text)}, complete=True)
        assert taken is not None
        assert taken.recorded == 1
        database = Database(url)
        (total,) = await database.read(totals)
        assert (total.key, total.requests, total.cost_usd) == ("alice", 2, 2 * 364)
        database.close()
