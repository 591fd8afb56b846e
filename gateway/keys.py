"""API keys: who may come in, and as which tenant.

A key is `sk-` and 192 random bits. Stored is HMAC-SHA256(secret, key), so neither the database alone nor a copy of it
lets anybody in. `KeyRegister` changes keys (command line, `signalbox up`); `KeyRing` is what a gateway checks with.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, Row, Select, select, update

from gateway.db.database import Database, open_engine, reading
from gateway.db.schema import api_keys, key_sequence
from replicas.protocol import AuthenticationFailed, ConfigError, InvalidRequest, Unavailable

SECRET_VARIABLE = "SIGNALBOX_KEY_SECRET"
SECRET_FILE = "key-secret"
_MAX_KEY_BYTES = 256
# Unknown keys make the ring look again, but never more often than this.
_REREAD_INTERVAL_S = 0.02

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`hint` is the key's first characters, enough to recognise it. Times are Unix seconds."""

    id: str
    name: str
    tenant: str
    hash: bytes
    hint: str
    created_at: float
    revoked_at: float | None


def load_secret(state_dir: str | Path) -> bytes:
    """The HMAC secret: SIGNALBOX_KEY_SECRET, else `state_dir`/key-secret (created on first use, mode 0600)."""
    if value := os.environ.get(SECRET_VARIABLE):
        if len(value) < 16:
            raise ConfigError(f"{SECRET_VARIABLE} must have at least 16 characters")
        return value.encode()
    if not str(state_dir):
        raise ConfigError(f"set {SECRET_VARIABLE} or a state_dir to keep the key secret in")
    path = Path(state_dir) / SECRET_FILE
    if not path.exists():
        _create_secret(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{SECRET_FILE} in the state directory is readable by others; chmod 600 it")
    return path.read_bytes().strip()


def _create_secret(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(draft, path)  # fails if another process was first, and then theirs is the secret
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def digest(secret: bytes, key: bytes) -> bytes:
    return hmac.digest(secret, key, "sha256")


class KeyRegister:
    """Create, list and revoke, blocking. Use as a context manager."""

    def __init__(self, database_url: str, secret: bytes) -> None:
        self._engine = open_engine(database_url)
        self._secret = secret

    def __enter__(self) -> KeyRegister:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._engine.dispose()

    def create(self, name: str, tenant: str | None = None) -> str:
        """A new key, shown only now. A name has one live key at most; its default tenant is the name itself."""
        _check_label(name, "name")
        _check_label(tenant if tenant is not None else name, "tenant")
        key = f"sk-{secrets.token_hex(24)}"
        with self._engine.begin() as connection:
            version = _next_version(connection)
            if connection.execute(_live(name)).first():
                raise InvalidRequest(f"a key named {name!r} exists; revoke it first or choose another name")
            row = {
                "id": f"key_{secrets.token_hex(8)}",
                "name": name,
                "tenant": tenant if tenant is not None else name,
                "hash": digest(self._secret, key.encode()),
                "hint": key[:7],
                "created_at": time.time(),
                "version": version,
            }
            connection.execute(api_keys.insert().values(row))
        return key

    def list(self) -> list[ApiKey]:
        """All keys ever made, oldest first."""
        with reading(self._engine).begin() as connection:
            return [_api_key(row) for row in connection.execute(select(api_keys).order_by(api_keys.c.created_at))]

    def revoke(self, name_or_id: str) -> ApiKey:
        """End the live key of that name or id; InvalidRequest when there is none."""
        with self._engine.begin() as connection:
            version = _next_version(connection)
            row = connection.execute(_live(name_or_id)).first()
            if row is None:
                raise InvalidRequest(f"no live key is named {name_or_id!r}")
            change = {"revoked_at": time.time(), "version": version}
            connection.execute(update(api_keys).where(api_keys.c.id == row.id).values(change))
            return _api_key(row)


def _live(name_or_id: str) -> Select[Any]:
    matches = (api_keys.c.name == name_or_id) | (api_keys.c.id == name_or_id)
    return select(api_keys).where(matches, api_keys.c.revoked_at.is_(None))


def _next_version(connection: Connection) -> int:
    bump = update(key_sequence).where(key_sequence.c.id == 1).values(value=key_sequence.c.value + 1)
    version: int = connection.execute(bump.returning(key_sequence.c.value)).scalar_one()
    return version


def _check_label(text: str, what: str) -> None:
    if not (0 < len(text) <= 128 and text.isprintable()):
        raise InvalidRequest(f"a key's {what} must have 1 to 128 printable characters", param=what)


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(row.id, row.name, row.tenant, bytes(row.hash), row.hint, row.created_at, row.revoked_at)


class KeyRing:
    """All live keys in memory, never older than `stale_s` when a decision is made on them.

    A poll every `poll_s` asks only for rows changed since the last one. A key the ring does not know makes it look
    again before refusing, so a key works as soon as it is created; looks are shared and spaced. When the database
    cannot be read the ring grows stale and then refuses everybody with Unavailable rather than trust old news.
    """

    def __init__(self, database: Database, secret: bytes, *, poll_s: float, stale_s: float) -> None:
        self._database = database
        self._secret = secret
        self._poll_s = poll_s
        self._stale_s = stale_s
        self._keys: dict[bytes, ApiKey] = {}
        # Those that came in lately, by a quick digest under a key of this process: OpenSSL takes several times as long
        # for HMAC-SHA256 as all the rest of this. Emptied by every change.
        self._known: dict[bytes, ApiKey] = {}
        self._salt = secrets.token_bytes(32)
        self._version = 0
        self._read_at = float("-inf")  # when the last successful read began
        self._reading: asyncio.Task[None] | None = None
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._read_since(time.monotonic())
        self._poller = asyncio.create_task(self._poll(), name="key-poll")

    async def aclose(self) -> None:
        tasks = [task for task in (self._poller, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def authenticate(self, authorization: bytes) -> ApiKey:
        """The key behind an Authorization header's value; AuthenticationFailed or Unavailable."""
        scheme, _, token = authorization.partition(b" ")
        token = token.strip()
        if scheme.lower() != b"bearer" or not token:
            raise AuthenticationFailed("no API key given; send it as 'Authorization: Bearer sk-...'")
        if len(token) > _MAX_KEY_BYTES:
            raise AuthenticationFailed("incorrect API key provided")
        name = blake2b(token, key=self._salt, digest_size=16).digest()
        known = self._known.get(name)
        if known is not None and time.monotonic() - self._read_at <= self._stale_s:
            return known
        key = self._known[name] = await self._look_up(token)
        return key

    async def _look_up(self, token: bytes) -> ApiKey:
        wanted, arrived = digest(self._secret, token), time.monotonic()
        if arrived - self._read_at > self._stale_s:
            await self._read_since(arrived)
        if wanted not in self._keys:
            await self._read_since(arrived)
        key = self._keys.get(wanted)
        if key is None or not hmac.compare_digest(key.hash, wanted):
            raise AuthenticationFailed("incorrect API key provided")
        return key

    async def _read_since(self, moment: float) -> None:
        """Return when a read that began at `moment` or later has succeeded; all callers share it."""
        while self._read_at < moment:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read(), name="key-read")
            try:
                await asyncio.shield(self._reading)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.error("API keys cannot be read: %s", type(error).__name__)
                raise Unavailable("API keys cannot be checked at the moment", retry_after_s=1.0) from error

    async def _read(self) -> None:
        await asyncio.sleep(max(0.0, self._read_at + _REREAD_INTERVAL_S - time.monotonic()))
        began = time.monotonic()
        version = self._version
        changed = await self._database.read(
            lambda connection: connection.execute(
                select(api_keys).where(api_keys.c.version > version).order_by(api_keys.c.version)
            ).all()
        )
        self._apply(changed)
        self._read_at = began

    def _apply(self, rows: Iterable[Row[Any]]) -> None:
        for row in rows:
            key = _api_key(row)
            if key.revoked_at is None:
                self._keys[key.hash] = key
            else:
                self._keys.pop(key.hash, None)
            self._version = row.version
            self._known.clear()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._read_since(time.monotonic())
            except Unavailable:
                continue  # already logged; requests now wait for a read of their own
