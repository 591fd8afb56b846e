"""Rate limits in the database: one limit for all gateways, with the promises of `policies.limits`."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from gateway.errors import error_headers, http_error
from gateway.ledger.entries import LimitReached, Reservation
from policies.budget import Scope
from policies.limits import RateLimit
from replicas.protocol import BudgetExceeded, RateLimited
from tests.gateway.ledgers import BACKENDS, USED, Clock, accounts, new_database, running, spend


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


FIVE = (RateLimit(scope=Scope(key="alice"), requests=5, tokens=1000, concurrency=4),)


async def test_limits_are_shared_between_gateways(url: str) -> None:
    only = (RateLimit(scope=Scope(key="alice"), requests=5),)
    async with running(url, "gw-1") as one, running(url, "gw-2") as two:
        asked = [(one, two)[n % 2].reserve(spend(f"r{n}"), limits=only) for n in range(40)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        granted = [answer for answer in answers if isinstance(answer, Reservation)]
        assert len(granted) == 5
        assert sorted(each.standings[0]["requests"].remaining for each in granted) == [0, 1, 2, 3, 4]
        refused = next(answer for answer in answers if isinstance(answer, LimitReached))
        assert http_error(refused).status == 429
        waits = sorted(answer.retry_after_s or 0.0 for answer in answers if isinstance(answer, RateLimited))
        assert waits == pytest.approx([12.0 * n for n in range(1, 36)], abs=3)
        assert (b"retry-after", b"%d" % math.ceil(refused.retry_after_s or 0)) in error_headers(refused)
        assert refused.standings[0]["requests"].remaining == 0
        for ledger in (one, two):
            for each in list(ledger._open.values()):
                await ledger.release(each)


async def test_who_waits_as_long_as_told_gets_in_at_whichever_gateway(url: str, clock: Clock) -> None:
    only = (RateLimit(scope=Scope(key="alice"), requests=60),)
    async with running(url, "gw-1", clock) as one, running(url, "gw-2", clock) as two:
        for number in range(60):
            await one.reserve(spend(f"r{number}"), limits=only)
        waits: list[tuple[float, bytes]] = []
        for number in range(10):
            with pytest.raises(RateLimited) as refused:
                await one.reserve(spend(f"w{number}", claimant=bytes([number])), limits=only)
            assert refused.value.retry_after_s is not None
            waits.append((clock.now + refused.value.retry_after_s, bytes([number])))
        for moment, claimant in waits:
            clock.now = moment + 0.5
            with pytest.raises(RateLimited):
                await two.reserve(spend(f"n{claimant.hex()}", claimant=b"newcomer"), limits=only)
            await two.reserve(spend(f"c{claimant.hex()}", claimant=claimant), limits=only)
        one._open.clear()
        two._open.clear()


async def test_an_end_gives_back_the_place_and_the_unused_tokens(url: str, clock: Clock) -> None:
    async with running(url, clock=clock) as ledger:
        reservations = [await ledger.reserve(spend(f"r{n}", most=90), limits=FIVE) for n in range(4)]
        with pytest.raises(RateLimited, match="4 requests at once") as refused:
            await ledger.reserve(spend("fifth"), limits=FIVE)
        assert refused.value.retry_after_s is None
        await ledger.settle(reservations[0], USED)
        fifth = await ledger.reserve(spend("fifth", most=90), limits=FIVE)
        assert fifth.standings[0]["tokens"].remaining == 1000 - 4 * 100 - 13
        for reservation in (*reservations[1:], fifth):
            await ledger.release(reservation)


async def test_a_dead_gateways_places_are_given_back(url: str, clock: Clock) -> None:
    only = (RateLimit(scope=Scope(key="alice"), concurrency=1),)
    async with running(url, "gw-1", clock) as dead, running(url, "gw-2", clock) as other:
        await dead.reserve(spend("a"), limits=only)
        with pytest.raises(RateLimited):
            await other.reserve(spend("b"), limits=only)
        clock.now += 11
        await other.take_over("gw-1", {}, complete=False)
        await other.release(await other.reserve(spend("c"), limits=only))
        dead._open.clear()


async def test_a_budget_that_refuses_costs_no_place_in_the_minute(url: str) -> None:
    async with running(url) as ledger:
        for number in range(10):
            with pytest.raises(BudgetExceeded):
                await ledger.reserve(spend(f"r{number}"), accounts(usd=1), FIVE)
        reservation = await ledger.reserve(spend("a"), (), FIVE)
        assert reservation.standings[0]["requests"].remaining == 4
        await ledger.release(reservation)
