"""Which model a conversation began with, for groups that keep it: in the database, so that every gateway knows.

HTTP has no conversations, only lists of messages that grow. One is known by how it opens: its messages up to the first
of the user, hashed with a key together with its tenant and its group, so no text is kept and no tenant meets another's.
Two of one tenant that open alike count as one. Read once a turn, before the model is chosen; written when a
conversation begins, before anything of its answer is sent; that it goes on is noted with others, soon after.

A database that fails or is slow costs nobody an answer: the model is then chosen as if the conversation began.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from gateway.db.database import Database

logger = logging.getLogger(__name__)

_TOGETHER_S = 0.5
# An answer is kept waiting for the database no longer than this.
_PATIENCE_S = 2.0
# Conversations that this gateway begins between two looks for what is past its time.
_PRUNE_EVERY = 256


@dataclass(slots=True, kw_only=True)
class Session:
    """A turn of a conversation. began: the model of its first turn, None if this is that. outcome: for explanations."""

    id: str
    began: str | None
    outcome: str = ""


class Sessions:
    """One gateway's side. most: conversations that are kept; those that were silent for longest go first."""

    def __init__(
        self, database: Database, secret: bytes, *, most: int = 100_000, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._key = hashlib.sha256(secret).digest()
        self._most = most
        self._clock = clock
        self._begun = 0
        self._going_on: dict[str, float] = {}
        self._noting: asyncio.Task[None] | None = None
        self._beginning: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        if self._noting is not None:
            self._noting.cancel()
            await asyncio.gather(self._noting, return_exceptions=True)
        await asyncio.gather(*self._beginning)
        await self._note()

    async def find(self, tenant: str, group: str, messages: Sequence[Any]) -> Session:
        """The conversation that these messages belong to."""
        id = self._id(tenant, group, messages)
        try:
            look = self._database.read(lambda connection: _model(connection, id, self._clock()))
            began = await asyncio.wait_for(look, _PATIENCE_S)
        except (SQLAlchemyError, TimeoutError) as error:
            logger.warning("conversations cannot be looked up: %s", type(error).__name__)
            began = None
        return Session(id=id, began=began)

    async def begin(self, session: Session, model: str, keep_s: float, until: float | None = None) -> None:
        """It is answered by that model from now on, unless another gateway has begun it meanwhile.

        until: the answer's deadline, by the loop's clock; the database may be told after it.
        """
        beginning = asyncio.create_task(self._begin(session, model, keep_s), name="begin-conversation")
        self._beginning.add(beginning)
        beginning.add_done_callback(self._beginning.discard)
        left_s = _PATIENCE_S if until is None else until - asyncio.get_running_loop().time()
        await asyncio.wait({beginning}, timeout=max(0.0, min(_PATIENCE_S, left_s)))

    async def _begin(self, session: Session, model: str, keep_s: float) -> None:
        prune = self._begun % _PRUNE_EVERY == 0
        self._begun += 1

        def write(connection: Connection) -> None:
            now = self._clock()
            _begin(connection, session, model, now, now + keep_s)
            if prune:
                _prune(connection, now, self._most)

        try:
            await self._database.write(write)
        except SQLAlchemyError as error:
            logger.warning("a conversation cannot be noted: %s", type(error).__name__)

    def goes_on(self, session: Session, keep_s: float) -> None:
        self._going_on[session.id] = self._clock() + keep_s
        if self._noting is None:
            self._noting = asyncio.create_task(self._note_soon(), name="keep-conversations")

    async def _note_soon(self) -> None:
        while self._going_on:
            await asyncio.sleep(_TOGETHER_S)
            await self._note()
        self._noting = None

    async def _note(self) -> None:
        noted, self._going_on = self._going_on, {}
        if not noted:
            return
        rows = [{"id": id, "until": until} for id, until in sorted(noted.items())]
        change = text("UPDATE conversations SET expires_at = :until WHERE id = :id AND expires_at < :until")
        try:
            await self._database.write(lambda connection: connection.execute(change, rows))
        except SQLAlchemyError as error:
            logger.warning("that conversations go on cannot be noted: %s", type(error).__name__)

    def _id(self, tenant: str, group: str, messages: Sequence[Any]) -> str:
        said = json.dumps([tenant, group, *_opening(messages)], separators=(",", ":")).encode()
        return hashlib.blake2b(said, digest_size=16, key=self._key).hexdigest()


def _opening(messages: Sequence[Any]) -> list[Any]:
    """What a conversation always begins with, the same whether it was read as ours or to be passed on."""
    opening = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        opening.append([role, _said(message.get("content")) if isinstance(message, Mapping) else message])
        if role == "user":
            break
    return opening


def _said(content: Any) -> Any:
    """Text as text, in however many parts it comes."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "\n".join(texts) if len(texts) == len(content) else content


def _model(connection: Connection, id: str, now: float) -> str | None:
    query = text("SELECT model FROM conversations WHERE id = :id AND expires_at > :now")
    found: str | None = connection.execute(query, {"id": id, "now": now}).scalar()
    return found


def _begin(connection: Connection, session: Session, model: str, now: float, until: float) -> None:
    connection.execute(
        text(
            "INSERT INTO conversations (id, model, expires_at) VALUES (:id, :model, :until) ON CONFLICT (id) DO UPDATE"
            " SET model = excluded.model, expires_at = excluded.expires_at"
            " WHERE conversations.expires_at <= :now OR conversations.model = :instead_of"
        ),
        {"id": session.id, "model": model, "until": until, "now": now, "instead_of": session.began or ""},
    )


def _prune(connection: Connection, now: float, most: int) -> None:
    connection.execute(text("DELETE FROM conversations WHERE expires_at <= :now"), {"now": now})
    connection.execute(
        text(
            "DELETE FROM conversations WHERE expires_at < (SELECT MIN(expires_at) FROM"
            " (SELECT expires_at FROM conversations ORDER BY expires_at DESC LIMIT :most) AS kept)"
        ),
        {"most": most},
    )
