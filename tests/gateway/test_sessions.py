"""A conversation keeps the model that it began with, on whichever gateway its turns arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from gateway.config import ServedModel
from gateway.db.database import Database
from gateway.sessions import Sessions
from tests.gateway.conftest import Gateway, StartGateway, make_key, running
from tests.gateway.ledgers import BACKENDS, Clock, new_database

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
MORE = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now?"}]
PARTS = [HELLO[0], {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
POLICY = "groups: {auto: {models: [small, large], session: {keep_model: true, idle_s: %s}}}"


# ---------------------------------------------------------------------------------------------------- through gateways


@pytest.fixture
def two(start_gateway: StartGateway) -> Iterator[Callable[..., tuple[Gateway, Gateway]]]:
    """`two(policy)`: two gateways on one database, in front of a replica of `large` alone."""
    with_second: list[Any] = []

    def start(policy: str) -> tuple[Gateway, Gateway]:
        gateway = start_gateway(replicas=[], models=(ServedModel(name="small"), ServedModel(name="large")))
        gateway.add(name="l", model="large")
        gateway.wait_ready(1)
        with gateway.register() as register:
            register.publish(policy, author="test")
        context = second(gateway)
        with_second.append(context)
        return gateway, context.__enter__()

    yield start
    for context in with_second:
        context.__exit__(None, None, None)


@contextmanager
def second(gateway: Gateway) -> Iterator[Gateway]:
    with running(gateway.config_of_another(), gateway.key) as other:
        meet(gateway, other, 1)
        yield other


def meet(gateway: Gateway, other: Gateway, count: int) -> None:
    """Both know all replicas of the first."""
    other.loop.call_soon_threadsafe(other.directory.publish, [one.server.address for one in gateway.replicas])
    for one in (gateway, other):
        one.wait_ready(count)


def ask(gateway: Gateway, messages: list[dict[str, Any]], key: str = "", **changes: Any) -> tuple[str, str]:
    """The model that answered, and the request's id."""
    body = {"model": "auto", "messages": messages, "max_tokens": 2, **changes}
    headers = {"authorization": f"Bearer {key or gateway.key}"}
    with gateway.http(headers=headers) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    model = "large" if '"large"' in answer.text.replace(" ", "") else "small"
    return model, answer.headers["x-request-id"]


def outcome(gateway: Gateway, request_id: str) -> str | None:
    told: str | None = gateway.explain(request_id, gateway.admin_token())[0]["session"]
    return told


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_stays_with_its_model_on_another_gateway(two: Callable[..., Any], stream: bool) -> None:
    gateway, other = two(POLICY % 900)
    model, first = ask(gateway, HELLO, stream=stream)
    assert (model, outcome(gateway, first)) == ("large", "begins")
    gateway.add(name="s", model="small")
    meet(gateway, other, 2)
    model, again = ask(other, MORE, stream=stream)
    assert (model, outcome(other, again)) == ("large", "stays with 'large'")
    assert ask(gateway, PARTS)[0] == "large", "the same opening in parts"
    assert ask(other, [{"role": "user", "content": "Another one"}])[0] == "small"
    with gateway.http() as http:  # a text is no conversation
        answer = http.post("/v1/completions", json={"model": "auto", "prompt": "Hello", "max_tokens": 2})
    assert answer.json()["model"] == "small"


def test_while_its_model_is_away_another_one_answers_and_then_it_goes_back(two: Callable[..., Any]) -> None:
    gateway, other = two(POLICY % 900)
    assert ask(gateway, HELLO)[0] == "large"
    gateway.add(name="s", model="small")
    [large] = [one for one in gateway.replicas if one.server.address.model == "large"]
    gateway.remove(large)
    meet(gateway, other, 1)
    model, away = ask(other, MORE)
    assert (model, outcome(other, away)) == ("small", "began with 'large', which has no ready replica")
    large.server.stop()
    gateway.add(name="l2", model="large")
    meet(gateway, other, 2)
    assert ask(other, MORE)[0] == "large"


def test_tenants_do_not_share_conversations_and_groups_that_do_not_ask_keep_nothing(two: Callable[..., Any]) -> None:
    gateway, other = two(POLICY % 900 + "\naliases: {same: auto}")
    assert ask(gateway, HELLO)[0] == "large"
    gateway.add(name="s", model="small")
    meet(gateway, other, 2)
    assert ask(other, HELLO, make_key(gateway.config, "stranger"))[0] == "small"
    assert ask(other, HELLO, model="same")[0] == "large", "an alias of the group is the group"
    with gateway.register() as register:
        register.publish("groups: {auto: {models: [small, large]}}", author="test")
    model, asked = ask(other, MORE)
    assert (model, outcome(other, asked)) == ("small", None)
    engine = create_engine(gateway.config.database_url)
    with engine.begin() as connection:
        kept = connection.execute(text("SELECT * FROM conversations")).all()
    engine.dispose()
    assert sorted(row.model for row in kept) == ["large", "small"]
    assert "Hello" not in str(kept)


# ------------------------------------------------------------------------------------------------------------ by itself


@pytest.fixture(params=BACKENDS)
async def sessions(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Sessions, Sessions, Clock]]:
    """Two gateways' sessions over one database, which keep three conversations."""
    url, clock = new_database(request.param, tmp_path), Clock()
    databases = [Database(url) for _ in range(2)]
    one, other = (Sessions(database, b"secret", most=3, clock=clock) for database in databases)
    yield one, other, clock
    for each in (one, other):
        await each.aclose()
    for database in databases:
        database.close()


async def began(sessions: Sessions, word: str) -> str | None:
    return (await sessions.find("team", "auto", [{"role": "user", "content": word}])).began


async def begin(sessions: Sessions, word: str, model: str) -> None:
    session = await sessions.find("team", "auto", [{"role": "user", "content": word}])
    await sessions.begin(session, model, 900)


async def test_of_two_gateways_that_begin_at_once_the_first_decides(
    sessions: tuple[Sessions, Sessions, Clock],
) -> None:
    one, other, _ = sessions
    mine, theirs = [await each.find("team", "auto", HELLO) for each in (one, other)]
    await one.begin(mine, "large", 900)
    await other.begin(theirs, "small", 900)
    again = await other.find("team", "auto", MORE)
    assert again.began == "large"
    await other.begin(again, "small", 900)  # as when "large" has left the group
    assert (await one.find("team", "auto", MORE)).began == "small"


async def test_a_conversation_that_pauses_too_long_begins_anew_and_one_that_goes_on_does_not(
    sessions: tuple[Sessions, Sessions, Clock],
) -> None:
    one, other, clock = sessions
    await begin(one, "goes on", "large")
    await begin(one, "pauses", "large")
    clock.now += 600
    one.goes_on(await one.find("team", "auto", [{"role": "user", "content": "goes on"}]), 900)
    await one.aclose()  # writes what waits
    clock.now += 600
    assert (await began(other, "goes on"), await began(other, "pauses")) == ("large", None)
    await begin(other, "pauses", "small")
    assert await began(one, "pauses") == "small"


async def test_only_so_many_are_kept_and_the_silent_go_first(
    sessions: tuple[Sessions, Sessions, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.sessions._PRUNE_EVERY", 1)
    one, other, clock = sessions
    for word in "abcde":
        await begin(one, word, "large")
        clock.now += 1
    assert [await began(other, word) for word in "abcde"] == [None, None, "large", "large", "large"]


async def test_a_database_that_fails_costs_nobody_an_answer(
    sessions: tuple[Sessions, Sessions, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, _ = sessions

    async def fails(_: object) -> None:
        raise OperationalError("", {}, Exception("gone"))

    monkeypatch.setattr(one._database, "read", fails)
    monkeypatch.setattr(one._database, "write", fails)
    await begin(one, "a", "large")
    one.goes_on(await one.find("team", "auto", HELLO), 900)
    await one.aclose()
    assert await began(one, "a") is None


async def test_a_database_that_is_slow_keeps_no_answer_waiting_and_is_told_all_the_same(
    sessions: tuple[Sessions, Sessions, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A locked database held answers back for as long as it was locked, past the callers' own time limits."""
    one, other, _ = sessions
    unlocked, write = asyncio.Event(), one._database.write

    async def slow(change: Callable[[Any], Any]) -> Any:
        await unlocked.wait()
        return await write(change)

    with monkeypatch.context() as locked:
        locked.setattr("gateway.sessions._PATIENCE_S", 0.01)
        locked.setattr(one._database, "write", slow)
        await begin(one, "a", "large")
        locked.setattr("gateway.sessions._PATIENCE_S", 60.0)
        late = asyncio.get_running_loop().time()
        await one.begin(await one.find("team", "auto", HELLO), "large", 900, late)
        locked.setattr("gateway.sessions._PATIENCE_S", 0.01)
        locked.setattr(one._database, "read", lambda _: unlocked.wait())
        assert await began(one, "a") is None
        unlocked.set()
        await one.aclose()
    monkeypatch.setattr("gateway.sessions._PATIENCE_S", 10.0)
    assert await began(other, "a") == "large"
