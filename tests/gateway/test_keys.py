"""Keys: what is stored, who gets in, and how fast a revocation is felt in every gateway."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sqlite3
import threading
import time

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import OperationalError

from gateway.config import GatewayConfig, ServedModel
from gateway.db.database import Database, open_engine
from gateway.db.schema import metadata
from gateway.keys import KeyRegister, KeyRing, load_secret
from replicas.protocol import AuthenticationFailed, ConfigError, InvalidRequest, Unavailable

SECRET = b"a secret for tests only"


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/keys.db"


@pytest.fixture
def register(url):
    with KeyRegister(url, SECRET) as register:
        yield register


def open_and_close(url: str) -> None:
    open_engine(url).dispose()


def bearer(key: str) -> bytes:
    return b"Bearer " + key.encode()


def test_the_key_itself_is_stored_nowhere(register, tmp_path) -> None:
    key = register.create("alice")
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.startswith("sk-")
    assert key.encode() not in stored
    assert key[3:].encode() not in stored


def test_a_name_has_one_live_key_and_can_be_used_again(register) -> None:
    first = register.create("alice")
    with pytest.raises(InvalidRequest, match="exists"):
        register.create("alice")
    register.revoke("alice")
    assert register.create("alice", tenant="acme") != first
    assert [(key.name, key.tenant, key.revoked_at is None) for key in register.list()] == [
        ("alice", "alice", False),
        ("alice", "acme", True),
    ]
    with pytest.raises(InvalidRequest, match="no live key"):
        register.revoke("bob")
    assert register.revoke(register.list()[1].id).name == "alice"


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb"])
def test_names_are_short_and_printable(register, name: str) -> None:
    with pytest.raises(InvalidRequest):
        register.create(name)


async def test_a_ring_knows_a_new_key_at_once_and_forgets_a_revoked_one_within_a_second(register, url) -> None:
    databases = [Database(url), Database(url)]
    rings = [KeyRing(database, SECRET, poll_s=0.4, stale_s=0.9) for database in databases]
    try:
        for ring in rings:
            await ring.start()
        key = register.create("alice", tenant="acme")
        for ring in rings:
            assert (await ring.authenticate(bearer(key))).tenant == "acme"
        register.revoke("alice")
        revoked = time.monotonic()
        for ring in rings:
            while await opens(ring, key):
                assert time.monotonic() - revoked < 1.0
                await asyncio.sleep(0.01)
        assert time.monotonic() - revoked < 1.0
    finally:
        for ring, database in zip(rings, databases, strict=True):
            await ring.aclose()
            database.close()


async def opens(ring: KeyRing, key: str) -> bool:
    try:
        await ring.authenticate(bearer(key))
    except AuthenticationFailed:
        return False
    return True


async def test_a_key_hashed_with_another_secret_does_not_open(register, url) -> None:
    key = register.create("alice")
    database = Database(url)
    ring = KeyRing(database, b"some other secret value", poll_s=0.4, stale_s=0.9)
    await ring.start()
    with pytest.raises(AuthenticationFailed):
        await ring.authenticate(bearer(key))
    await ring.aclose()
    database.close()


async def test_a_ring_whose_database_is_gone_refuses_rather_than_trust_old_news(register, url, monkeypatch) -> None:
    key = register.create("alice")
    database = Database(url)
    ring = KeyRing(database, SECRET, poll_s=0.05, stale_s=0.1)
    await ring.start()

    async def broken(_query):
        raise OperationalError("SELECT", {}, Exception("disk is gone"))

    with monkeypatch.context() as patched:
        patched.setattr(database, "read", broken)
        await asyncio.sleep(0.2)
        with pytest.raises(Unavailable):
            await ring.authenticate(bearer(key))
    assert (await ring.authenticate(bearer(key))).name == "alice"
    await ring.aclose()
    database.close()


async def test_unknown_keys_cost_the_database_little(register, url) -> None:
    database = Database(url)
    ring = KeyRing(database, SECRET, poll_s=0.4, stale_s=0.9)
    reads = 0
    read = database.read

    async def counted(query):
        nonlocal reads
        reads += 1
        return await read(query)

    database.read = counted
    await ring.start()
    began = time.monotonic()
    answers = await asyncio.gather(
        *(ring.authenticate(f"Bearer sk-{i}".encode()) for i in range(300)), return_exceptions=True
    )
    assert all(isinstance(answer, AuthenticationFailed) for answer in answers)
    assert reads <= 3 + (time.monotonic() - began) / 0.02
    await ring.aclose()
    database.close()


def test_the_secret_is_made_once_private_and_from_the_environment_if_given(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SIGNALBOX_KEY_SECRET", raising=False)
    secret = load_secret(tmp_path / "state")
    assert secret == load_secret(tmp_path / "state")
    assert len(secret) == 64
    file = tmp_path / "state" / "key-secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path / "state") == ["key-secret"]
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="readable by others"):
        load_secret(tmp_path / "state")
    monkeypatch.setenv("SIGNALBOX_KEY_SECRET", "0123456789abcdef")
    assert load_secret("") == b"0123456789abcdef"
    monkeypatch.setenv("SIGNALBOX_KEY_SECRET", "short")
    with pytest.raises(ConfigError, match="16 characters"):
        load_secret("")


def test_gateways_that_start_together_on_a_new_database_migrate_it_once(url) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=open_and_close, args=(url,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]


def test_the_migrations_build_exactly_the_tables_the_code_uses(url) -> None:
    engine = open_engine(url)
    found = inspect(engine)
    try:
        for table in metadata.sorted_tables:
            columns = {column["name"]: column for column in found.get_columns(table.name)}
            assert set(columns) == {column.name for column in table.columns}
            for column in table.columns:
                assert str(columns[column.name]["type"]) == str(column.type.compile(engine.dialect))
                assert columns[column.name]["nullable"] == column.nullable
            assert {index["name"] for index in found.get_indexes(table.name)} == {i.name for i in table.indexes}
    finally:
        engine.dispose()


def test_sqlite_runs_in_wal_and_writers_wait_instead_of_failing(url, tmp_path) -> None:
    with KeyRegister(url, SECRET) as register:
        register.create("first")
        other = sqlite3.connect(tmp_path / "keys.db", isolation_level=None, check_same_thread=False)
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.3, other.rollback)
        release.start()
        began = time.monotonic()
        register.create("second")
        assert time.monotonic() - began > 0.2
        release.join()
        other.close()


def test_a_revoked_key_is_refused_by_every_running_gateway_within_a_second(start_gateway) -> None:
    first = start_gateway()
    second = start_gateway(gateway_id="another")
    config = first.config
    assert second.config.database_url == config.database_url
    body = {"model": "fake", "prompt": "hi", "max_tokens": 1}
    with KeyRegister(config.database_url, load_secret(config.state_dir)) as register, first.http() as a:
        key = register.create("visitor")
        headers = {"authorization": f"Bearer {key}"}
        with second.http() as b:
            assert a.post("/v1/completions", json=body, headers=headers).status_code == 200
            assert b.post("/v1/completions", json=body, headers=headers).status_code == 200
            register.revoke("visitor")
            time.sleep(1.0)
            assert a.post("/v1/completions", json=body, headers=headers).status_code == 401
            assert b.post("/v1/completions", json=body, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "changes",
    [
        {"models": ()},
        {"models": (ServedModel(name="a"), ServedModel(name="b", aliases=("a",)))},
        {"models": (ServedModel(name=""),)},
        {"key_stale_s": 1.5},
        {"key_poll_s": 0.95},
    ],
)
def test_a_configuration_that_cannot_be_kept_is_refused(changes) -> None:
    given = {"models": (ServedModel(name="a"),), "database_url": "sqlite://"}
    with pytest.raises(ConfigError):
        GatewayConfig(**{**given, **changes})
