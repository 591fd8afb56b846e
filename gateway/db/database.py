"""Opens the database, brings it to the newest schema, and keeps its blocking calls off the event loop.

SQLite: WAL, so readers never wait for the writer; every writing transaction is BEGIN IMMEDIATE, because one that
upgrades from a read lock fails with SQLITE_BUSY at once, whatever busy_timeout says; synchronous=NORMAL survives
kill -9 of every process, but may lose the last commits at power loss (never consistency).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

T = TypeVar("T")

BUSY_TIMEOUT_S = 10.0
_MIGRATIONS = Path(__file__).parent / "migrations"
_READ_ONLY = "signalbox_read_only"
_POSTGRES_MIGRATION_LOCK = 0x516E4164


def open_engine(url: str) -> Engine:
    """An engine with the schema at head. Safely raced by several processes: one migrates, the others wait for it."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1))  # hosting services write it so
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite":
        if parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False})
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        engine = create_engine(parsed, pool_pre_ping=True)
    try:
        _upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def reading(engine: Engine) -> Engine:
    """The same engine for transactions that only read: they take no write lock."""
    return engine.execution_options(**{_READ_ONLY: True})


class Database:
    """One thread of its own in front of an engine; every method may be called from an event loop.

    A single thread, so writers of this process queue here, in order, instead of in SQLite's busy handler.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gateway-db")

    async def read(self, query: Callable[[Connection], T]) -> T:
        return await self._run(reading(self._engine), query)

    async def write(self, change: Callable[[Connection], T]) -> T:
        """One transaction: committed when `change` returns, rolled back when it raises."""
        return await self._run(self._engine, change)

    async def _run(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        def run() -> T:
            with engine.begin() as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def close(self) -> None:
        self._thread.shutdown()
        self._engine.dispose()


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver must not begin transactions by itself; `_begin_sqlite` does, so that DDL is transactional too.
    connection.isolation_level = None
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except Exception as error:
            # Changing the journal mode does not honour busy_timeout when two processes open a new file together.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _upgrade(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    for attempt in range(3):
        try:
            with engine.begin() as connection:
                # Whoever holds this lock migrates; the next one finds the schema at head and changes nothing.
                if engine.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_MIGRATION_LOCK})
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
            return
        except OperationalError as error:
            if attempt == 2 or "locked" not in str(error):
                raise
