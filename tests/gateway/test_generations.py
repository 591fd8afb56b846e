"""Publishing policies: every gateway turns together, nobody is left in between, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import OperationalError

from gateway import generations, policy_follower, policy_register, proposals
from gateway.db.database import Database, open_engine
from gateway.db.schema import policy_gateways, policy_switches
from gateway.policy_errors import PolicyConflict, PublishRefused, UnknownGeneration
from gateway.policy_follower import PolicyFollower
from gateway.policy_register import PolicyRegister
from gateway.proposals import Plan
from load.postgres import Postgres, programs, running_postgres
from policies import canary
from policies.document import FleetNames, PolicyDocument
from policies.yaml_text import DocumentError
from replicas.protocol import ConfigError, InvalidRequest, Unavailable

NAMES = FleetNames(("small", "big"), ("tiny",))
KEYS = [f"key_{number}" for number in range(200)]

Follower = PolicyFollower[Any]
StartFollower = Callable[..., Awaitable[Follower]]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    try:
        programs()
    except RuntimeError as error:
        pytest.skip(str(error))
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/policies.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def sqlite_url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/policies.db"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_register, "_NOTICE_S", 0.1)


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> float:
    """A shorter one, for tests that wait until it has run out."""
    for module in (generations, policy_follower, policy_register, proposals):
        monkeypatch.setattr(module, "LEASE_S", 1.5)
    monkeypatch.setattr(policy_follower, "HEARTBEAT_S", 0.3)
    return 1.5


@asynccontextmanager
async def followers(url: str) -> AsyncIterator[StartFollower]:
    """`await start(name, compile)`: a gateway's follower with a database of its own."""
    async with AsyncExitStack() as stack:

        async def start(
            name: str,
            compile: Callable[[int, PolicyDocument], Any] = lambda number, _: number,
            names=NAMES,
            poll_s=0.02,
        ) -> Follower:
            database = Database(url)
            stack.callback(database.close)
            follower = PolicyFollower(database, name, NAMES, compile, poll_s=poll_s)
            await follower.start()
            stack.push_async_callback(follower.aclose)
            return follower

        yield start


def numbers(follower: Follower) -> set[int]:
    return {follower.generation_for(key).number for key in KEYS}


def publish(register: PolicyRegister, document: str, **options: Any) -> Awaitable[policy_register.Change]:
    return asyncio.to_thread(lambda: register.publish(document, **{"author": "alice", **options}))


Look: TypeAlias = tuple[float, float, int]  # just before it, just after it, the generation's number


async def test_fifty_publications_turn_two_gateways_together_and_no_request_sees_two(url: str) -> None:
    seen: list[list[Look]] = [[], []]
    count = 50 if url.startswith("sqlite") else 20

    async def requests(follower: Follower, log: list[Look]) -> None:
        while True:
            before = time.time()
            generation = follower.generation_for("key_1")
            log.append((before, time.time(), generation.number))
            assert generation.compiled == generation.number
            await asyncio.sleep(0.001)

    async with followers(url) as start:
        both = [await start("a"), await start("b")]
        tasks = [asyncio.create_task(requests(follower, log)) for follower, log in zip(both, seen, strict=True)]
        with PolicyRegister(url) as register:
            for number in range(1, count + 1):
                change = await publish(register, f"aliases: {{fast: {'small' if number % 2 else 'big'}}}\n")
                assert (change.switch.active, change.gateways, change.unanswered) == (number, ("a", "b"), ())
                # whoever published finds it everywhere
                assert [follower.generation_for("key_1").number for follower in both] == [number, number]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for log in seen:
        assert [number for *_, number in log] == sorted(number for *_, number in log)
        assert {number for *_, number in log} == set(range(count + 1))
    assert max(overlaps(*seen)) < 0.005


def overlaps(one: list[Look], other: list[Look]) -> Iterator[float]:
    """For each generation: how long at least one gateway began requests by it while another still did by an older one.

    A machine that stalls in the middle of a look makes that look long and not the overlap.
    """
    for a, b in ((one, other), (other, one)):
        for generation in {number for *_, number in a} - {0}:
            first = min(after for _, after, number in a if number == generation)
            yield max((before - first for before, _, number in b if number < generation), default=0.0)


async def test_a_generation_that_a_gateway_cannot_serve_changes_nothing(url: str) -> None:
    def picky(number: int, document: PolicyDocument) -> int:
        if document.aliases:
            raise ConfigError("no room for aliases")
        return number

    async with followers(url) as start:
        good, bad = await start("good"), await start("bad", picky)
        with PolicyRegister(url) as register:
            with pytest.raises(PublishRefused, match="gateway bad cannot serve it: no room for aliases"):
                await publish(register, "aliases: {fast: small}\n", why="faster")
            assert numbers(good) == numbers(bad) == {0}
            assert register.state().active == 0
            assert [(entry.number, entry.state) for entry in register.history()] == [(1, "refused"), (0, "active")]
            [entry] = register.audit()
            assert (entry.actor, entry.outcome, entry.why, entry.diff) == (
                "alice", "failed", "faster", '+ aliases.fast: "small"',
            )  # fmt: skip
            assert "no room" in entry.detail
            await publish(register, "affinity: {policy: least_load}\n")
            assert numbers(good) == numbers(bad) == {2}


async def test_an_invalid_document_changes_nothing_and_names_the_line(url: str) -> None:
    async with followers(url) as start:
        follower = await start("a")
        with PolicyRegister(url) as register:
            for document, message in (
                (
                    "groups:\n  auto: {modles: []}\n",
                    "policy:2: groups.auto.modles: unknown key; did you mean 'models'?",
                ),
                (
                    "aliases:\n  x: smal\n",
                    "policy:2: aliases.x: there is no model or group 'smal'; did you mean 'small'?",
                ),
                ("aliases:\n  tiny: small\n", "policy:2: aliases.tiny: the fleet has a model or alias 'tiny'"),
            ):
                with pytest.raises(DocumentError) as error:
                    await publish(register, document)
                assert message in error.value.message
                assert register.audit()[0].outcome == "refused"
                assert message in register.audit()[0].detail
            assert len(register.history()) == 1
        assert numbers(follower) == {0}


async def test_of_two_publishers_at_once_one_wins_and_the_other_is_told(url: str) -> None:
    async with followers(url) as start:
        await start("slow", lambda number, _: time.sleep(0.3) if number else None)
        with PolicyRegister(url) as register, PolicyRegister(url) as other:
            first = asyncio.ensure_future(publish(register, "{}"))
            await asyncio.sleep(0.15)
            with pytest.raises(PolicyConflict, match="alice is changing the policy at this moment"):
                await publish(other, "{}", author="bob")
            assert (await first).switch.active == 1
            with pytest.raises(PolicyConflict, match="generation 1 is active, not 0"):
                await publish(other, "{}", author="bob", parent=0)
            assert (await publish(other, "{}", author="bob", parent=1)).switch.active == 2


async def test_a_gateway_that_starts_during_a_publication_takes_part_in_it(url: str) -> None:
    async with followers(url) as start:
        slow = await start("slow", lambda number, _: time.sleep(0.4) if number else None)
        with PolicyRegister(url) as register:
            publishing = asyncio.ensure_future(publish(register, "{}"))
            await asyncio.sleep(0.15)
            late = await start("late")
            assert numbers(late) == {0}
            change = await publishing
            assert change.gateways == ("late", "slow")
            assert numbers(late) == numbers(slow) == {1}


async def test_gateways_that_start_together_all_join(url: str) -> None:
    async with followers(url) as start:
        await asyncio.gather(*(start(f"gw{number}") for number in range(6)))
        with PolicyRegister(url) as register:
            assert len((await publish(register, "{}")).gateways) == 6


def killed_while_preparing(url: str, preparing: Any) -> None:
    def hang(number: int, _: PolicyDocument) -> None:
        if number:
            preparing.set()
            time.sleep(60)

    async def run() -> None:
        async with followers(url) as start:
            await start("victim", hang)
            preparing.clear()
            await asyncio.sleep(60)

    asyncio.run(run())


async def test_a_gateway_killed_during_a_publication_holds_it_up_no_longer_than_its_lease(
    sqlite_url: str, lease: float
) -> None:
    context = multiprocessing.get_context("spawn")
    preparing = context.Event()
    preparing.set()
    process = context.Process(target=killed_while_preparing, args=(sqlite_url, preparing))
    process.start()
    try:
        async with followers(sqlite_url) as start:
            survivor = await start("survivor")
            while preparing.is_set():
                await asyncio.sleep(0.02)
            with PolicyRegister(sqlite_url) as register:
                publishing = asyncio.ensure_future(publish(register, "{}"))
                await asyncio.to_thread(preparing.wait, 10)
                process.kill()
                killed = time.monotonic()
                assert numbers(survivor) == {0}
                change = await publishing
                assert time.monotonic() - killed < lease + 1
                assert change.gateways == ("survivor",)
                assert numbers(survivor) == {1}
    finally:
        process.kill()
        process.join()


async def test_a_predictor_that_loads_longer_than_a_lease_lasts_is_waited_for(sqlite_url: str, lease: float) -> None:
    async with followers(sqlite_url) as start:
        slow = await start("slow", lambda number, _: time.sleep(lease + 0.4) if number else None)
        with PolicyRegister(sqlite_url) as register:
            publishing = asyncio.ensure_future(publish(register, "{}"))
            while not publishing.done():
                assert len(numbers(slow)) == 1  # and it goes on serving
                await asyncio.sleep(0.01)
            assert (await publishing).gateways == ("slow",)
            assert numbers(slow) == {1}


async def test_a_gateway_that_stood_still_while_a_switch_was_pending_does_not_miss_its_moment(url: str) -> None:
    """On a busy machine a gateway that was not run for longer than the notice served the old generation after others
    had turned: for 0.24 s in one of fifty publications."""
    async with followers(url) as start:
        follower = await start("a")
        with PolicyRegister(url) as register, PolicyRegister(url) as other:
            proposed = asyncio.create_task(publish(register, "aliases: {fast: small}\n"))
            while not follower._proposed:
                await asyncio.sleep(0.001)
            assert follower._poller is not None
            follower._poller.cancel()  # from here on it looks no more by itself
            await follower._look(report=True)
            while other.state().active == 0:
                await asyncio.sleep(0.005)
            await asyncio.sleep(policy_register._NOTICE_S + 0.05)
            if follower.stale:
                await follower.refresh()
            assert numbers(follower) == {1}
            assert not follower.stale
            register.stop()
            await proposed


async def test_a_canary_serves_a_stable_share_that_grows_without_losing_a_key(url: str) -> None:
    async with followers(url) as start:
        follower = await start("a")

        def canaries(number: int) -> set[str]:
            return {key for key in KEYS if follower.generation_for(key).number == number}

        with PolicyRegister(url) as register:
            await publish(register, "canary: {share: 20%, salt: s}\n")
            few = canaries(1)
            assert few == {key for key in KEYS if canary.serves(key, 0.2, "s")}
            assert [(e.state, e.share) for e in register.history()] == [("canary", 0.2), ("active", 0.8)]
            await asyncio.to_thread(lambda: register.promote(author="alice", share=0.5))
            assert few < canaries(1) < set(KEYS)
            await asyncio.to_thread(lambda: register.promote(author="alice"))
            assert canaries(1) == set(KEYS)
            await publish(register, "{}", canary=0.5)
            assert canaries(2)
            await asyncio.to_thread(lambda: register.cancel(author="alice"))
            assert numbers(follower) == {1}
            with pytest.raises(InvalidRequest, match="no canary"):
                register.cancel(author="alice")
            await publish(register, "canary: {share: 5%}\n", canary=1.0)
            assert numbers(follower) == {3}


async def test_a_request_keeps_the_generation_it_began_with(sqlite_url: str) -> None:
    async with followers(sqlite_url) as start:
        follower = await start("a", lambda _, document: dict(document.aliases))
        with PolicyRegister(sqlite_url) as register:
            await publish(register, "aliases: {fast: small}\n")
            held = follower.generation_for("key_1")
            await publish(register, "aliases: {fast: big}\n")
            await publish(register, "{}\n")
        assert (held.number, held.compiled, held.document.aliases) == (1, {"fast": "small"}, {"fast": "small"})
        assert len(follower._built) <= 2  # and nothing is kept for it, beyond what served last


async def test_rollback_walks_back_and_says_when_there_is_nothing_left(url: str) -> None:
    async with followers(url) as start:
        follower = await start("a")
        with PolicyRegister(url) as register:
            for target in ("small", "big"):
                await publish(register, f"aliases: {{fast: {target}}}\n")
            await publish(register, "{}\n", canary=0.5)

            def rollback(to: int | None = None) -> Awaitable[policy_register.Change]:
                return asyncio.to_thread(lambda: register.rollback(author="bob", why="no", to=to))

            for expected in (2, 1, 0):  # the canary first
                await rollback()
                assert numbers(follower) == {expected}
            with pytest.raises(InvalidRequest, match="nothing to roll back to"):
                await rollback()
            with pytest.raises(UnknownGeneration):
                await rollback(77)
            assert (await rollback(2)).diff == ('+ aliases.fast: "big"',)
            assert numbers(follower) == {2}
            assert register.show(2).document == "aliases: {fast: big}\n"
            assert register.compare(1, 2) == ['~ aliases.fast: "small" -> "big"']
            actions = [(entry.action, entry.outcome) for entry in register.audit(4)]
            assert actions == [
                ("rollback", "done"),
                ("rollback", "refused"),
                ("rollback", "refused"),
                ("rollback", "done"),
            ]


def test_without_a_gateway_a_publication_serves_at_once_and_names_come_from_the_fleet_file(url: str) -> None:
    with PolicyRegister(url, names=NAMES) as register:
        began = time.monotonic()
        assert register.publish("{}", author="alice").gateways == ()
        assert time.monotonic() - began < 1
        with pytest.raises(DocumentError, match="no model 'nobody'"):
            register.publish("fallbacks: {nobody: [small]}", author="alice")
        assert [entry.number for entry in register.history(limit=1)] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"author": ""}, "author"), ({"author": "a\nb"}, "author"), ({"why": "x" * 2001}, "why"), ({"why": "\0"}, "why"),
     ({"canary": 0.0}, "share"), ({"canary": float("nan")}, "share")],
)  # fmt: skip
def test_who_and_why_and_how_much_are_checked(sqlite_url: str, options: dict[str, Any], message: str) -> None:
    with PolicyRegister(sqlite_url) as register, pytest.raises(InvalidRequest, match=message):
        register.publish("{}", **{"author": "alice", **options})


def test_a_proposal_whose_publisher_died_expires_and_is_recorded(sqlite_url: str) -> None:
    with PolicyRegister(sqlite_url) as register:
        engine = open_engine(sqlite_url)
        with engine.begin() as connection:
            proposals.propose(connection, "publish", "ghost", lambda _connection, _now: Plan(0))
        with pytest.raises(PolicyConflict, match="ghost"):
            register.publish("{}", author="alice")
        with engine.begin() as connection:
            connection.execute(
                update(policy_switches).where(policy_switches.c.author == "ghost").values(expires_at=1.0)
            )
        register.publish("{}", author="alice")
        engine.dispose()
        assert [(entry.actor, entry.outcome) for entry in register.audit()] == [
            ("alice", "done"), ("ghost", "failed"), ("alice", "refused"),
        ]  # fmt: skip


async def test_a_publisher_that_is_told_to_stop_takes_its_proposal_back(sqlite_url: str) -> None:
    async with followers(sqlite_url) as start:
        follower = await start("slow", lambda number, _: time.sleep(0.5) if number else None)
        with PolicyRegister(sqlite_url) as register:
            publishing = asyncio.ensure_future(publish(register, "{}"))
            await asyncio.sleep(0.1)
            register.stop()
            with pytest.raises(PublishRefused, match="stopping"):
                await publishing
        with PolicyRegister(sqlite_url) as register:
            assert register.state().active == 0
            assert (await publish(register, "{}")).switch.active == 2
        assert numbers(follower) == {2}


async def test_a_gateway_that_cannot_serve_what_is_active_does_not_start(sqlite_url: str) -> None:
    with PolicyRegister(sqlite_url) as register:
        register.publish("fallbacks:\n  gone: [small]\n", author="alice")
    async with followers(sqlite_url) as start:
        with pytest.raises(ConfigError, match=r"generation 1 cannot be served here: generation 1:2: .*no model 'gone'"):
            await start("a")


async def test_a_gateway_without_its_database_stops_answering_when_its_lease_ends(
    sqlite_url: str, lease: float, monkeypatch
) -> None:
    async with followers(sqlite_url) as start:
        follower = await start("a")
        assert not follower.stale

        async def broken(_query: Any) -> Any:
            raise OperationalError("SELECT", {}, Exception("disk is gone"))

        with monkeypatch.context() as patched:
            patched.setattr(follower._database, "read", broken)
            began = time.monotonic()
            while not follower.stale:
                follower.generation_for("key_1")
                await asyncio.sleep(0.02)
            assert time.monotonic() - began < lease + 0.5
            with pytest.raises(Unavailable):
                follower.generation_for("key_1")
            with pytest.raises(Unavailable):
                await follower.refresh()
        await follower.refresh()
        assert follower.generation_for("key_1").number == 0


async def test_a_gateway_that_was_away_serves_nothing_it_cannot_and_recovers_by_a_rollback(sqlite_url: str) -> None:
    def picky(number: int, _: PolicyDocument) -> int:
        if number == 1:
            raise ConfigError("not that one")
        return number

    async with followers(sqlite_url) as start:
        follower = await start("away", picky, poll_s=60)
        engine = open_engine(sqlite_url)
        with engine.begin() as connection:  # as if it had been silent for a lease
            connection.execute(update(policy_gateways).values(seen_at=0.0))
        engine.dispose()
        with PolicyRegister(sqlite_url) as register:
            assert register.publish("{}", author="alice").gateways == ()
            for _ in range(3):  # look, build and fail, look again
                await follower._look(report=True)
                await asyncio.sleep(0.1)
            with pytest.raises(Unavailable):
                follower.generation_for("key_1")
            with pytest.raises(Unavailable):
                await follower.refresh()
            register.rollback(author="alice")
            await follower.refresh()
            assert follower.generation_for("key_1").number == 0


async def test_a_gateway_that_stops_signs_off(sqlite_url: str) -> None:
    async with followers(sqlite_url) as start:
        await start("a")
        with PolicyRegister(sqlite_url) as register:
            assert [gateway.id for gateway in register.gateways()] == ["a"]
    with PolicyRegister(sqlite_url) as register:
        assert register.gateways() == []


def test_the_first_generation_is_the_empty_document(url: str) -> None:
    with PolicyRegister(url) as register:
        assert register.active().document == "{}\n"
        assert register.validate(register.active().document) == PolicyDocument()
    engine = open_engine(url)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM policy_generations")).scalar_one() == 1
    engine.dispose()
