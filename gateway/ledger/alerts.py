"""Tells webhooks of alerts that the ledger has raised: each event once in the database, delivered at least once.

A request is a POST of the event's JSON, whose "id" is the same in every delivery, with

    x-signalbox-signature: t=<Unix seconds>,v1=<hex HMAC-SHA256(secret, "<t>." + body)>

Any 2xx answer ends it; otherwise it is tried again after 1, 2, 4, ... seconds, at most an hour apart, ATTEMPTS times. A
gateway claims an event before it sends, so gateways do not send the same one together.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from gateway.db.database import Database
from gateway.ledger.sql import Statements

logger = logging.getLogger(__name__)

ATTEMPTS = 16
SIGNATURE = "x-signalbox-signature"
_TIMEOUT_S = 10.0
_LONGEST_PAUSE_S = 3600.0
# Longer than an attempt takes: who claimed an event and died has left it to the others by then.
_CLAIM_S = 4 * _TIMEOUT_S
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Event:
    id: str
    body: bytes
    webhook: str
    attempts: int


def signature(secret: bytes, moment: int, body: bytes) -> str:
    return f"t={moment},v1={hmac.digest(secret, b'%d.' % moment + body, 'sha256').hex()}"


class Webhooks:
    """Delivers until `aclose`. `poll_s` is how soon an event is noticed."""

    def __init__(
        self, database: Database, secret: bytes, *, poll_s: float = 1.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._secret = secret
        self._poll_s = poll_s
        self._clock = clock
        # redirects are not followed: an event goes where the policy says, nowhere else
        self._client = httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="ledger-webhooks")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    async def _run(self) -> None:
        while True:
            try:
                await self.deliver()
            except SQLAlchemyError as error:
                logger.warning("alerts cannot be read: %s", type(error).__name__)
            await asyncio.sleep(self._poll_s)

    async def deliver(self) -> int:
        """Send what is due; how many were accepted."""
        now = self._clock()
        due = await self._database.read(lambda connection: _is_due(connection, now))
        if not due:
            return 0
        events = await self._database.write(lambda connection: _claim(connection, now))
        return sum(await asyncio.gather(*(self._send(event) for event in events)))

    async def _send(self, event: _Event) -> bool:
        headers = {
            "content-type": "application/json",
            SIGNATURE: signature(self._secret, int(self._clock()), event.body),
        }
        try:
            answer = await self._client.post(event.webhook, content=event.body, headers=headers)
            problem = "" if answer.is_success else f"status {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = type(error).__name__
        now = self._clock()
        if problem:
            pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (event.attempts - 1))
            again = now + pause_s if event.attempts < ATTEMPTS else None
            logger.warning("the webhook for alert %s failed (%s), attempt %d", event.id, problem, event.attempts)
            await self._database.write(lambda connection: _later(connection, event.id, again))
            return False
        await self._database.write(lambda connection: _done(connection, event.id, now))
        return True


def _is_due(connection: Connection, now: float) -> bool:
    return bool(Statements(connection).run("SELECT 1 FROM ledger_events WHERE next_at <= ? LIMIT 1", now))


def _claim(connection: Connection, now: float) -> list[_Event]:
    statements = Statements(connection)
    due = statements.for_update(
        "SELECT id, payload, webhook, attempts FROM ledger_events WHERE next_at <= ? ORDER BY id LIMIT ?", now, _AT_ONCE
    )
    statements.many(
        "UPDATE ledger_events SET next_at=?, attempts=attempts+1 WHERE id=?", [(now + _CLAIM_S, row[0]) for row in due]
    )
    return [_Event(id, payload.encode(), webhook, attempts + 1) for id, payload, webhook, attempts in due]


def _later(connection: Connection, id: str, again: float | None) -> None:
    Statements(connection).run("UPDATE ledger_events SET next_at=? WHERE id=?", again, id)


def _done(connection: Connection, id: str, now: float) -> None:
    Statements(connection).run("UPDATE ledger_events SET next_at=NULL, delivered_at=? WHERE id=?", now, id)
