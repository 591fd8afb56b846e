"""Alerts are raised once and delivered signed; the books can be read and stay bounded."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gateway.db.database import Database
from gateway.ledger.alerts import ATTEMPTS, SIGNATURE, Webhooks
from gateway.ledger.usage import Retention, prune, request, standings, totals
from policies.budget import Budget, Budgets, Scope, Window
from replicas.protocol import Usage
from tests.gateway.ledgers import ALICE, BACKENDS, Clock, accounts, new_database, running, spend

SECRET = b"webhook secret"
TEN = Usage(prompt_tokens=0, completion_tokens=10)


class Receiver(ThreadingHTTPServer):
    """A webhook's server: answers with the statuses it is given, then 200, and keeps what it was sent."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.bodies: list[bytes] = []
        self.signatures: list[str] = []
        super().__init__(("127.0.0.1", 0), _Receive)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/alerts"


class _Receive(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.server.signatures.append(self.headers[SIGNATURE])
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_each_alert_is_raised_once_a_window_by_all_gateways_together(
    url: str, clock: Clock, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """100 settlements of 10 tokens in two gateways, with alerts at 50 and 80 % of 1000 tokens; then the next window."""
    told = accounts(Window.MINUTE, tokens=1000, alerts=(5000, 8000), webhook=receiver.url)
    async with running(url, "gw-1", clock) as one, running(url, "gw-2", clock) as two:
        database = Database(url)
        hooks = [Webhooks(database, SECRET, clock=clock) for _ in range(2)]
        for window in range(2):
            for at in range(0, 100, 20):
                asked = ((one, two)[n % 2].reserve(spend(f"{window}-{at + n}", 0, 10), told) for n in range(20))
                reservations = await asyncio.gather(*asked)
                ends = [(one, two)[n % 2].settle(reservation, TEN) for n, reservation in enumerate(reservations)]
                assert all(await asyncio.gather(*ends))
            await asyncio.gather(*(each.deliver() for each in hooks))
            clock.now += 60
        events = [json.loads(body) for body in receiver.bodies]
        assert sorted((event["window_starts"] % 3600, event["share"]) for event in events) == [
            *((0, 0.5), (0, 0.8), (60, 0.5), (60, 0.8))
        ]
        assert len({event["id"] for event in events}) == 4
        assert caplog.text.count("% of the budget") == 4
        for each in hooks:
            await each.aclose()
        database.close()


async def _one_alert(url: str, clock: Clock, webhook: str) -> None:
    async with running(url, "gw-1", clock) as ledger:
        told = accounts(tokens=10, alerts=(10_000,), webhook=webhook)
        await ledger.settle(await ledger.reserve(spend("a", 0, 10), told), TEN)


async def test_a_webhook_that_fails_is_tried_again_with_a_right_signature(
    url: str, clock: Clock, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302]
    await _one_alert(url, clock, receiver.url)
    database = Database(url)
    hooks = Webhooks(database, SECRET, clock=clock)
    accepted = []
    for pause in (0.0, 0.5, 0.6, 1.0, 1.1, 3600.0):
        clock.now += pause
        accepted.append(await hooks.deliver())
    assert accepted == [0, 0, 0, 0, 1, 0]
    assert len(set(receiver.bodies)) == 1
    for body, line in zip(receiver.bodies, receiver.signatures, strict=True):
        moment, _, digest = line.removeprefix("t=").partition(",v1=")
        assert hmac.new(SECRET, moment.encode() + b"." + body, "sha256").hexdigest() == digest
    await hooks.aclose()
    database.close()


async def test_a_webhook_that_never_answers_is_given_up(tmp_path: Path, clock: Clock) -> None:
    url = new_database("sqlite", tmp_path)
    await _one_alert(url, clock, "http://127.0.0.1:9/nobody")
    database = Database(url)
    hooks = Webhooks(database, SECRET, clock=clock)
    for _ in range(ATTEMPTS + 5):
        await hooks.deliver()
        clock.now += 3601
    row = await database.read(lambda c: c.exec_driver_sql("SELECT attempts, next_at FROM ledger_events").one())
    assert tuple(row) == (ATTEMPTS, None)
    await hooks.aclose()
    database.close()


async def test_days_become_months_without_changing_a_sum(url: str, clock: Clock) -> None:
    async with running(url, "gw-1", clock, record_s=0.001) as ledger:
        for day in range(120):
            assert await ledger.settle(await ledger.reserve(spend(f"r{day}")), TEN)
            clock.now += 86_400
        database = Database(url)
        before = await database.read(totals)
        await database.write(lambda connection: prune(connection, clock.now))
        await database.write(lambda connection: prune(connection, clock.now))
        after = await database.read(totals)
        assert len(before) == 120
        assert len(after) < 100
        assert {len(total.period) for total in after} == {7, 10}
        assert sum(total.requests for total in after) == 120
        assert sum(total.cost_usd for total in after) == sum(total.cost_usd for total in before)
        assert len(await database.read(lambda c: totals(c, since="2026-12", until="2026-12"))) >= 1
        left = await database.read(lambda c: c.exec_driver_sql("SELECT COUNT(*) FROM ledger_requests").scalar())
        assert left == 7
        database.close()


async def test_closed_requests_are_bounded_in_number_and_open_ones_stay(url: str, clock: Clock) -> None:
    async with running(url, "gw-1", clock) as ledger:
        reservations = []
        for number in range(20):
            reservations.append(await ledger.reserve(spend(f"r{number}"), accounts(usd=10**9)))
            clock.now += 1
        for reservation in reservations[5:]:
            clock.now += 1
            await ledger.settle(reservation, TEN)
        clock.now += 40 * 86_400
        database = Database(url)
        keep = Retention(requests=4, request_s=1e9)
        await database.write(lambda connection: prune(connection, clock.now, keep))
        rows = await database.read(
            lambda c: c.exec_driver_sql("SELECT id, state FROM ledger_requests ORDER BY began_at").all()
        )
        assert [row.id for row in rows] == ["r0", "r1", "r2", "r3", "r4", "r16", "r17", "r18", "r19"]
        for reservation in reservations[:5]:
            assert await ledger.settle(reservation, TEN)
        database.close()


async def test_the_books_show_budgets_and_all_attempts_of_a_request(url: str, clock: Clock) -> None:
    budgets = Budgets(
        (
            Budget(scope=Scope(key="*"), window=Window.DAY, usd=10**9),
            Budget(scope=Scope(team="team"), window=Window.TOTAL, tokens=10**6),
        )
    ).accounts(ALICE)
    async with running(url, "gw-1", clock) as ledger:
        first = await ledger.reserve(spend("cmpl_1%"), budgets)
        await ledger.release(first)
        clock.now += 1
        second = await ledger.reserve(spend("cmpl_1%", attempt=1), budgets)
        await ledger.settle(second, TEN)
        await ledger.release(await ledger.reserve(spend("cmplx1%-r1"), budgets))
        database = Database(url)
        rows = await database.read(lambda connection: request(connection, "cmpl_1%"))
        assert [(row.id, row.state, row.cost_usd) for row in rows] == [
            ("cmpl_1%", "released", 0),
            ("cmpl_1%-r1", "settled", 1000),
        ]
        now = await database.read(lambda connection: standings(connection, clock.now))
        assert [(each.window, each.key, each.team, each.spent_usd, each.spent_tokens) for each in now] == [
            ("day", "alice", None, 1000, 10),
            ("total", None, "team", 1000, 10),
        ]
        database.close()
