"""How one process asks all gateways something: through the database that they share anyway.

No address, no port, no credential of its own: whoever may write to the database may ask. A question is a row; every
gateway looks for new ones all the time and writes its answer beside it. Costs some tenths of a second, so it is for
people (explanations, totals), never for requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from gateway.db.database import Database, reading
from gateway.db.schema import mailbox_answers, mailbox_questions
from gateway.generations import live_gateways

logger = logging.getLogger(__name__)

Answerer = Callable[[str], Awaitable[Any]]

_LOOK_S = 0.2
_WAIT_S = 0.02
# A gateway that is alive and busy may take this long; nobody waits for it longer.
PATIENCE_S = 2.0
_KEPT_S = 60.0
_MAX_AT_ONCE = 64


class Mailbox:
    """One gateway's side: answers others' questions and asks its own. answerers: by kind of question, JSON results."""

    def __init__(self, database: Database, gateway_id: str, answerers: Mapping[str, Answerer]) -> None:
        self._database = database
        self._id = gateway_id
        self._answerers = answerers
        self._seen = 0
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._seen = await self._database.read(_newest)
        self._reader = asyncio.create_task(self._read(), name="mailbox")

    async def aclose(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def ask(self, kind: str, body: str) -> list[Any]:
        """What this and every other live gateway answers, this one's first; a gateway may be missing (`PATIENCE_S`)."""
        own = await self._answerers[kind](body)
        others = await self._database.read(self._others)
        if not others:
            return [own]
        question = await self._database.write(lambda connection: put(connection, kind, body))
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                await asyncio.sleep(_WAIT_S)
                answers = await self._database.read(lambda connection: answered(connection, question))
                if others <= answers.keys() or time.monotonic() > deadline:
                    return [own, *(answers[gateway] for gateway in sorted(answers) if gateway != self._id)]
        finally:
            await self._database.write(lambda connection: take_away(connection, question))

    def _others(self, connection: Connection) -> set[str]:
        return {gateway.id for gateway in live_gateways(connection, time.time())} - {self._id}

    async def _read(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._answer_new()
            except SQLAlchemyError as error:
                logger.error("the mailbox cannot be read: %s", type(error).__name__)
            except Exception:
                logger.exception("a question could not be answered")

    async def _answer_new(self) -> None:
        if await self._database.read(_newest) <= self._seen:
            return
        after = self._seen
        for number, kind, body in await self._database.read(lambda connection: _questions(connection, after)):
            self._seen = number
            if kind in self._answerers:
                text = json.dumps(await self._answerers[kind](body))
                await self._database.write(partial(_answer, question=number, gateway=self._id, body=text))


# --------------------------------------------------------------------- each a function of an open connection


def put(connection: Connection, kind: str, body: str) -> int:
    """A new question's number. What has been lying about for long goes."""
    old = select(mailbox_questions.c.id).where(mailbox_questions.c.asked_at < time.time() - _KEPT_S)
    connection.execute(delete(mailbox_answers).where(mailbox_answers.c.question.in_(old)))
    connection.execute(delete(mailbox_questions).where(mailbox_questions.c.asked_at < time.time() - _KEPT_S))
    row = {"kind": kind, "body": body, "asked_at": time.time()}
    inserted = connection.execute(mailbox_questions.insert().values(row).returning(mailbox_questions.c.id))
    number: int = inserted.scalar_one()
    return number


def answered(connection: Connection, question: int) -> dict[str, Any]:
    """Answers so far, by gateway."""
    rows = connection.execute(select(mailbox_answers).where(mailbox_answers.c.question == question))
    return {row.gateway: json.loads(row.body) for row in rows}


def take_away(connection: Connection, question: int) -> None:
    connection.execute(delete(mailbox_answers).where(mailbox_answers.c.question == question))
    connection.execute(delete(mailbox_questions).where(mailbox_questions.c.id == question))


def _newest(connection: Connection) -> int:
    newest: int | None = connection.execute(select(func.max(mailbox_questions.c.id))).scalar_one()
    return newest or 0


def _questions(connection: Connection, after: int) -> list[tuple[int, str, str]]:
    query = select(mailbox_questions).where(mailbox_questions.c.id > after).order_by(mailbox_questions.c.id)
    return [(row.id, row.kind, row.body) for row in connection.execute(query.limit(_MAX_AT_ONCE))]


def _answer(connection: Connection, question: int, gateway: str, body: str) -> None:
    known = select(mailbox_questions.c.id).where(mailbox_questions.c.id == question)
    if connection.execute(known).first() is not None:  # else nobody waits any more
        connection.execute(mailbox_answers.insert().values(question=question, gateway=gateway, body=body))


def ask_all(engine: Engine, kind: str, body: str) -> list[Any]:
    """The same for a process that is no gateway; blocking. [] when no gateway is alive."""
    with reading(engine).begin() as connection:
        wanted = {gateway.id for gateway in live_gateways(connection, time.time())}
    if not wanted:
        return []
    with engine.begin() as connection:
        question = put(connection, kind, body)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            time.sleep(_WAIT_S)
            with reading(engine).begin() as connection:
                answers = answered(connection, question)
            if wanted <= answers.keys() or time.monotonic() > deadline:
                return [answers[gateway] for gateway in sorted(answers)]
    finally:
        with engine.begin() as connection:
            take_away(connection, question)
