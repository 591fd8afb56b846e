"""Admin tokens: who may use /admin. No API key opens it, and no admin token opens /v1: they live in different tables.

A token is `adm-` and 192 random bits; stored is HMAC-SHA256(secret, token), as with API keys. `AdminTokenRegister`
changes tokens, `AdminTokens` is what a gateway checks with.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sqlalchemy import Row, Select, select, update
from sqlalchemy.exc import SQLAlchemyError

from gateway.db.database import Database, open_engine, reading
from gateway.db.schema import admin_tokens
from gateway.keys import digest
from replicas.protocol import AuthenticationFailed, InvalidRequest, Unavailable

PREFIX = "adm-"
_LENGTH = len(PREFIX) + 48
# Tokens are few and read all together, but however many requests come, not more often than this.
_REREAD_INTERVAL_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdminToken:
    """`hint` is the token's first characters, enough to recognise it. Times are Unix seconds."""

    id: str
    name: str
    hash: bytes
    hint: str
    created_at: float
    revoked_at: float | None


class AdminTokenRegister:
    """Create, list and revoke, blocking. Use as a context manager."""

    def __init__(self, database_url: str, secret: bytes) -> None:
        self._engine = open_engine(database_url)
        self._secret = secret

    def __enter__(self) -> AdminTokenRegister:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._engine.dispose()

    def create(self, name: str) -> str:
        """A new token, shown only now. A name has one live token at most; it is the author of what it changes."""
        if not (0 < len(name) <= 128 and name.isprintable()):
            raise InvalidRequest("a token's name must have 1 to 128 printable characters", param="name")
        token = f"{PREFIX}{secrets.token_hex(24)}"
        with self._engine.begin() as connection:
            if connection.execute(_live(name)).first():
                raise InvalidRequest(f"an admin token named {name!r} exists; revoke it first or choose another name")
            row = {
                "id": f"admin_{secrets.token_hex(8)}",
                "name": name,
                "hash": digest(self._secret, token.encode()),
                "hint": token[: len(PREFIX) + 4],
                "created_at": time.time(),
            }
            connection.execute(admin_tokens.insert().values(row))
        return token

    def list(self) -> list[AdminToken]:
        """All tokens ever made, oldest first."""
        with reading(self._engine).begin() as connection:
            return [_token(row) for row in connection.execute(select(admin_tokens).order_by(admin_tokens.c.created_at))]

    def revoke(self, name_or_id: str) -> AdminToken:
        """End the live token of that name or id; InvalidRequest when there is none."""
        with self._engine.begin() as connection:
            row = connection.execute(_live(name_or_id)).first()
            if row is None:
                raise InvalidRequest(f"no live admin token is named {name_or_id!r}")
            own = admin_tokens.c.id == row.id
            connection.execute(update(admin_tokens).where(own).values(revoked_at=time.time()))
            return _token(row)


class AdminTokens:
    """Checks tokens against the table as it is now, or was some hundredths of a second ago."""

    def __init__(self, database: Database, secret: bytes) -> None:
        self._database = database
        self._secret = secret
        self._live: dict[bytes, AdminToken] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def authenticate(self, authorization: bytes) -> AdminToken:
        """The token behind an Authorization header's value; AuthenticationFailed or Unavailable."""
        scheme, _, value = authorization.partition(b" ")
        value = value.strip()
        if scheme.lower() != b"bearer" or not value.startswith(PREFIX.encode()) or len(value) != _LENGTH:
            raise AuthenticationFailed("an admin token is needed here; send it as 'Authorization: Bearer adm-...'")
        wanted = digest(self._secret, value)
        async with self._reading:
            if time.monotonic() - self._read_at > _REREAD_INTERVAL_S:
                await self._read()
        token = self._live.get(wanted)
        if token is None or not hmac.compare_digest(token.hash, wanted):
            raise AuthenticationFailed("incorrect admin token provided")
        return token

    async def _read(self) -> None:
        began = time.monotonic()
        query = select(admin_tokens).where(admin_tokens.c.revoked_at.is_(None))
        try:
            rows = await self._database.read(lambda connection: connection.execute(query).all())
        except SQLAlchemyError as error:
            logger.error("admin tokens cannot be read: %s", type(error).__name__)
            raise Unavailable("admin tokens cannot be checked at the moment", retry_after_s=1.0) from error
        self._live = {token.hash: token for token in map(_token, rows)}
        self._read_at = began


def _live(name_or_id: str) -> Select[Any]:
    matches = (admin_tokens.c.name == name_or_id) | (admin_tokens.c.id == name_or_id)
    return select(admin_tokens).where(matches, admin_tokens.c.revoked_at.is_(None))


def _token(row: Row[Any]) -> AdminToken:
    return AdminToken(row.id, row.name, bytes(row.hash), row.hint, row.created_at, row.revoked_at)
