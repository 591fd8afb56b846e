"""What a gateway serves by: follows the switches in the database and turns at the moment that they name.

Every `poll_s` it asks for the sequence's value; when that has changed it reads the switches ahead, builds the
generations they need (in a thread; requests go on), and reports which switch it is prepared for or why it refuses it.
A committed switch is kept in a plan and taken at its moment by whoever comes first, a request or the poll. While
something is pending it looks more often.

A gateway that could not report for a whole lease is not waited for by publishers, so it stops answering by itself:
Unavailable until it has read the database again. One that is prepared for a switch might miss its moment if its machine
lets it stand still; so while a switch is pending, a request whose gateway has not looked for `NEWS_S` looks first.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from gateway import generations
from gateway.db.database import Database
from gateway.generations import HEARTBEAT_S, LEASE_S, PROPOSED, LiveGateway, StoredGeneration, Switch
from policies.canary import DEFAULT_SALT, salt_bytes, serves_below, threshold
from policies.document import FleetNames, PolicyDocument, PredictorUnusable, parse, with_lines
from replicas.protocol import ConfigError, SignalboxError, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Compile = Callable[[int, PolicyDocument], T]

_PENDING_POLL_S = 0.02
# While a switch is pending. A commit names a moment further ahead than this, so whoever has looked so lately knows it.
NEWS_S = 0.1
_NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Generation(Generic[T]):
    """A generation as this gateway serves it; a request keeps the one it began with."""

    number: int
    document: PolicyDocument
    compiled: T


@dataclass(frozen=True, slots=True)
class _Serving(Generic[T]):
    """One switch, ready to decide by: a key below `limit` belongs to the canary."""

    switch: int
    at: float
    active: Generation[T]
    canary: Generation[T] | None
    salt: bytes
    limit: int


class _Moved(Exception):
    """Something was published between reading and signing on; the transaction is rolled back."""


class PolicyFollower(Generic[T]):
    """`compile` turns a document into what the gateway decides by; any error it raises refuses the generation.

    names: what this gateway's fleet serves; documents that name anything else are refused.
    """

    def __init__(
        self, database: Database, gateway_id: str, names: FleetNames, compile: Compile[T], *, poll_s: float = 0.1
    ) -> None:
        self._database = database
        self._id = gateway_id
        self._names = names
        self._compile = compile
        self._poll_s = poll_s
        self._built: dict[int, Generation[T]] = {}
        self._failed: dict[int, str] = {}
        self._builder: asyncio.Task[None] | None = None
        self._broken = ""
        self._now: _Serving[T] | None = None
        self._plan: list[_Serving[T]] = []
        self._turn_at = _NEVER  # when the first of the plan is due
        self._fresh_until = -_NEVER  # by the monotonic clock
        self._looked_at = -_NEVER  # likewise: when the last look that succeeded began
        self._version = -1
        self._prepared = -1
        self._refusal: str | None = None
        self._proposed = False
        self._served_at = 0.0
        self._reported: tuple[int, str | None, int] | None = None
        self._looking = asyncio.Lock()
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what serves now and join the gateways; ConfigError when this gateway cannot serve it."""
        while not await self._join():
            pass
        self._poller = asyncio.create_task(self._poll(), name="policy-poll")

    async def aclose(self) -> None:
        tasks = [task for task in (self._poller, self._builder) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._database.write(lambda connection: generations.sign_off(connection, self._id))
        except SQLAlchemyError as error:  # its lease will run out
            logger.warning("could not sign off: %s", type(error).__name__)

    # ------------------------------------------------------------------------------------------------- for requests

    @property
    def stale(self) -> bool:
        """Whether `generation_for` would refuse, or might miss a switch; then `await refresh()` first."""
        return self._lapsed or (self._proposed and time.monotonic() > self._looked_at + NEWS_S)

    @property
    def _lapsed(self) -> bool:
        return time.monotonic() > self._fresh_until

    @property
    def serving(self) -> tuple[int, int]:
        """Numbers of the active generation and of the canary's, 0 for none."""
        assert self._now is not None, "start() has returned"
        return self._now.active.number, self._now.canary.number if self._now.canary else 0

    def generation_for(self, key_id: str) -> Generation[T]:
        """The generation that a request of this key begins with, now. Unavailable while the database is unreachable."""
        if time.time() >= self._turn_at:
            self._turn()
        if self._lapsed:
            raise Unavailable("policies cannot be checked at the moment", retry_after_s=1.0)
        now = self._now
        assert now is not None, "start() has returned"
        if now.canary is not None and serves_below(key_id, now.salt, now.limit):
            return now.canary
        return now.active

    async def refresh(self) -> None:
        """Look at the database now; Unavailable when that fails for longer than the lease lasts."""
        if not self.stale:
            return
        try:
            async with self._looking:
                if self.stale:  # else another request has looked while this one waited
                    await self._look_alone(report=self._lapsed)
        except SQLAlchemyError as error:
            logger.error("policies cannot be read: %s", type(error).__name__)
        if self._lapsed:
            raise Unavailable("policies cannot be checked at the moment", retry_after_s=1.0)

    # -------------------------------------------------------------------------------------------------- keeping up

    async def _join(self) -> bool:
        """Build what is in the database; True when nothing has changed until the own row was there to be waited for."""
        await self._catch_up()
        while self._builder is not None:
            await self._builder
            await self._catch_up()
        if self._broken:
            raise ConfigError(self._broken)
        version, beginning = self._version, time.monotonic()

        def sign_on(connection: Connection) -> None:
            # waits for a publisher that is just committing, and keeps the next one out
            if generations.next_version(connection) != version + 1:
                raise _Moved
            generations.report(connection, self._row())

        try:
            await self._database.write(sign_on)
        except _Moved:
            return False
        self._fresh_until = beginning + LEASE_S
        return True

    async def _poll(self) -> None:
        reported_at = time.monotonic()
        while True:
            pending = self._proposed or self._plan or self._builder
            await asyncio.sleep(min(_PENDING_POLL_S, self._poll_s) if pending else self._poll_s)
            due = time.monotonic() - reported_at > HEARTBEAT_S
            try:
                if await self._look(report=due):
                    reported_at = time.monotonic()
            except SQLAlchemyError as error:
                logger.error("policies cannot be read: %s", type(error).__name__)
            except Exception:
                logger.exception("policies cannot be followed")
                await asyncio.sleep(HEARTBEAT_S)

    async def _look(self, report: bool) -> bool:
        async with self._looking:
            return await self._look_alone(report)

    async def _look_alone(self, report: bool) -> bool:
        """Read what has changed and turn if it is time; True when the own row was written."""
        beginning = time.monotonic()
        if await self._database.read(generations.version) != self._version:
            await self._catch_up()
        self._looked_at = beginning
        if self._broken:
            return False  # not heard of any more, it is not waited for either
        if time.time() >= self._turn_at:
            self._turn()
        state = (self._prepared, self._refusal, self._serving)
        if not report and state == self._reported:
            return False
        row = self._row()
        await self._database.write(lambda connection: generations.report(connection, row))
        self._reported = state
        self._fresh_until = beginning + LEASE_S
        return True

    async def _catch_up(self) -> None:
        """Lay out the plan as far as it is built, and have the rest built."""
        version, switches, rows = await self._database.read(self._read)
        plan: list[_Serving[T]] = []
        self._refusal, broken = None, ""
        for switch in switches:
            if unbuilt := [number for number in switch.generations if number not in self._built | self._failed]:
                self._start_building([rows[number] for number in unbuilt if number in rows])
                break
            refusals = [self._failed[number] for number in switch.generations if number in self._failed]
            if switch.state == PROPOSED:
                self._refusal = refusals[0] if refusals else None
            elif refusals:
                broken = f"policy generation {switch.active} cannot be served here: {refusals[0]}"
            else:
                plan.append(self._ready(switch))
                broken = ""
            self._prepared = switch.number
        self._break(broken)
        self._adopt(plan)
        self._proposed = any(switch.state == PROPOSED for switch in switches)
        self._version = version
        wanted = {number for switch in switches for number in switch.generations} | self._kept()
        self._built = {number: built for number, built in self._built.items() if number in wanted}
        self._failed = {number: reason for number, reason in self._failed.items() if number in wanted}

    def _break(self, reason: str) -> None:
        """It serves elsewhere already what cannot be served here, so nothing older may be served here."""
        if reason and reason != self._broken:
            logger.error("%s", reason)
        self._broken = reason
        if reason:
            self._fresh_until = -_NEVER

    def _start_building(self, rows: list[StoredGeneration]) -> None:
        if self._builder is None:
            self._builder = asyncio.create_task(self._build_all(rows), name="policy-build")

    async def _build_all(self, rows: list[StoredGeneration]) -> None:
        """In a task of its own: a predictor may take longer to load than a lease lasts."""
        for row in rows:
            try:
                self._built[row.number] = await asyncio.to_thread(self._build, row)
            except Exception as error:
                self._failed[row.number] = _reason(error)
                logger.warning("policy generation %d is refused: %s", row.number, self._failed[row.number])
        self._version = -1  # read again what was waiting for this
        self._builder = None

    def _read(self, connection: Connection) -> tuple[int, list[Switch], dict[int, StoredGeneration]]:
        """(version, the switch to serve by if there is a newer one, then those ahead; their generations not yet built).

        What cannot be served any more because a later switch was due already is left out.
        """
        version = generations.version(connection)
        base = generations.serving(connection, time.time())
        ahead = generations.ahead(connection, base.number)
        switches = [base, *ahead] if base.number > self._serving else ahead
        wanted = {number for switch in switches for number in switch.generations}
        wanted -= self._built.keys() | self._failed.keys()
        return version, switches, generations.stored(connection, wanted) if wanted else {}

    def _build(self, row: StoredGeneration) -> Generation[T]:
        name = f"generation {row.number}"
        document = parse(row.document, name, names=self._names)
        try:
            return Generation(row.number, document, self._compile(row.number, document))
        except PredictorUnusable as error:
            raise with_lines(row.document, name, error) from None

    def _ready(self, switch: Switch) -> _Serving[T]:
        assert switch.activate_at is not None, "it is committed"
        active = self._built[switch.active]
        if switch.canary is None:
            return _Serving(switch.number, switch.activate_at, active, None, b"", 0)
        canary = self._built[switch.canary]
        salt = canary.document.canary.salt if canary.document.canary else DEFAULT_SALT
        return _Serving(switch.number, switch.activate_at, active, canary, salt_bytes(salt), threshold(switch.share))

    def _adopt(self, plan: list[_Serving[T]]) -> None:
        """The plan replaces the one before; what is due is taken at once."""
        self._turn()  # what was known in time is not late
        self._plan = [serving for serving in plan if serving.switch > self._serving]
        self._turn_at = self._plan[0].at if self._plan else _NEVER
        if time.time() >= self._turn_at:
            self._turn(learned_at=time.time())

    def _turn(self, learned_at: float = 0.0) -> None:
        """Take what is due. It counts from its own moment, or from when it was learned of if that was later."""
        while self._plan and time.time() >= self._plan[0].at:
            self._now = self._plan.pop(0)
            self._served_at = max(self._now.at, learned_at)
        self._turn_at = self._plan[0].at if self._plan else _NEVER

    @property
    def _serving(self) -> int:
        return self._now.switch if self._now is not None else -1

    def _kept(self) -> set[int]:
        serving = [*([self._now] if self._now else []), *self._plan]
        return {one.number for each in serving for one in (each.active, each.canary) if one is not None}

    def _row(self) -> LiveGateway:
        return LiveGateway(
            id=self._id,
            seen_at=time.time(),
            names=self._names,
            prepared=self._prepared,
            refusal=self._refusal,
            serving=self._serving,
            served_at=self._served_at,
        )


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, SignalboxError) else f"{type(error).__name__}: {error}"
