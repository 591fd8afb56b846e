"""The ledger as one gateway process uses it, on its event loop.

    reservation = await ledger.reserve(spend, accounts, limits)      # or BudgetExceeded, RateLimited
    ...
    ledger.settle(reservation, usage)                                # however it ended; or ledger.release(reservation)

What arrives while a transaction runs is committed together in the next one (group commit), so a busy gateway pays for a
few transactions a second, and an idle one waits for exactly its own. `settle` and `release` need not be awaited: until
they are committed the reservation is covered by the gateway's lease, and whoever takes over a dead gateway finishes
them from the replica's journal. A database that does not answer refuses new reservations with Unavailable and keeps
what is to be settled until it does.

A request without accounts and limits touches no database before its answer: its usage is recorded in batches.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from gateway.config import LEASE_S
from gateway.db.database import Database
from gateway.ledger import usage
from gateway.ledger.entries import CUT, GATEWAY, Beat, Close, Ending, Operation, Record, Reservation, Reserve, Spend
from gateway.ledger.sql import Statements
from gateway.ledger.transaction import Journaled, Outcome, Taken, commit, compare, take_over
from gateway.ledger.work import Alert
from policies.budget import Account
from policies.limits import RateLimit
from replicas.protocol import EngineFault, SignalboxError, Unavailable, Usage

logger = logging.getLogger(__name__)

_UNREACHABLE = (OperationalError, InterfaceError)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSettings:
    """lease_s: after so long without a sign of life another gateway closes this one's reservations.
    record_s: how long usage that nothing was reserved for may wait to be written. batch: most operations in one
    transaction. retry_s: pause before a database that failed is tried again. unwritten: most operations kept meanwhile.
    """

    lease_s: float = LEASE_S
    record_s: float = 0.5
    batch: int = 256
    retry_s: float = 0.25
    unwritten: int = 100_000


@dataclass(slots=True, eq=False)
class _Pending:
    operation: Operation
    answer: asyncio.Future[Any]


class Ledger:
    """Belongs to one event loop, from `start` to `aclose`. `clock` gives Unix seconds, on any thread.

    on_closed: told of the endings that have just been committed.
    """

    def __init__(
        self,
        database: Database,
        gateway_id: str,
        *,
        settings: LedgerSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.gateway_id = gateway_id
        self.settings = settings or LedgerSettings()
        self.clock = clock
        self._database = database
        self._pending: deque[_Pending] = deque()
        self._records: list[_Pending] = []
        self._committing: asyncio.Task[None] | None = None
        self._heart: asyncio.Task[None] | None = None
        self._open: dict[str, Reservation] = {}
        self._leased_until = float("-inf")
        self._links: set[str] = set()
        self._linked: set[str] = set()
        self._lost: dict[str, frozenset[str]] = {}
        self.on_closed: Callable[[Collection[Close]], None] | None = None
        self._closing = False

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Take out the lease and begin to renew it."""
        await self.renew()
        self._heart = asyncio.create_task(self._beat(), name="ledger-heart")

    async def aclose(self) -> None:
        """Write everything that waits; reservations that are still open end with the lease."""
        self._closing = True
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
        self._flush_records()
        if self._committing is not None:
            await asyncio.gather(self._committing, return_exceptions=True)
        for pending in self._pending:
            pending.answer.cancel()
        if not self._open and not self._pending:
            try:
                await self._database.write(self._leave)
            except SQLAlchemyError as error:
                logger.warning("the ledger's lease could not be ended: %s", type(error).__name__)

    @property
    def open(self) -> int:
        """Reservations of this gateway that have neither been settled nor released."""
        return len(self._open)

    async def link(self, incarnation: str) -> None:
        """To be awaited before that replica is given anything: should this gateway die, its journal must be read."""
        self._links.add(incarnation)
        self._lost.pop(incarnation, None)
        while incarnation not in self._linked:
            await self._submit(Beat())

    def unlink(self, incarnation: str) -> None:
        """It is gone. Once all that is open now is closed, its journal has nothing more to say of this gateway."""
        if incarnation in self._links:
            self._lost[incarnation] = frozenset(self._open)

    # ---------------------------------------------------------------- what a request does

    async def reserve(
        self, spend: Spend, accounts: Sequence[Account] = (), limits: Sequence[RateLimit] = ()
    ) -> Reservation:
        """Hold the most that the request can cost in all accounts and gates, or raise and hold nothing.

        Raises BudgetExceeded, RateLimited or Unavailable. A caller that is cancelled meanwhile holds nothing.
        """
        if not accounts and not limits:
            reservation = Reservation(spend, self.clock())
            self._open[reservation.id] = reservation
            return reservation
        answer = self._submit(Reserve(spend, tuple(accounts), tuple(limits)))
        try:
            result: Reservation = await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.release(answer.result())
            raise
        return result

    def settle(
        self, reservation: Reservation, usage: Usage, *, estimated: bool = False, cut: bool = False
    ) -> asyncio.Future[bool]:
        """Charge what was used and give back the rest, once: True by the call that did it.

        cut: a replica may have made more than that, which its journal will tell.
        False: it was settled or released before, or another gateway took it over after this one's lease had run out.
        """
        return self._end(reservation, Ending(usage=usage, estimated=estimated, source=CUT if cut else GATEWAY))

    def release(self, reservation: Reservation, *, unbilled: int = 0, cut: bool = False) -> asyncio.Future[bool]:
        """Give all of it back, because nothing is to be paid for `unbilled` tokens. Otherwise like `settle`."""
        return self._end(reservation, Ending(usage=None, source=CUT if cut else GATEWAY, unbilled=unbilled))

    def _end(self, reservation: Reservation, ending: Ending) -> asyncio.Future[bool]:
        if self._open.pop(reservation.id, None) is None:
            return self._answered(False)
        if reservation.in_database:
            return self._submit(Close(reservation.id, ending))
        if ending.usage is None and not ending.unbilled:
            return self._answered(True)
        pending = _Pending(Record(reservation.spend, ending, reservation.began_at), self._future())
        self._records.append(pending)
        if len(self._records) == 1:
            asyncio.get_running_loop().call_later(self.settings.record_s, self._flush_records)
        elif len(self._records) >= self.settings.batch:
            self._flush_records()
        return pending.answer

    async def used(self, accounts: Sequence[Account]) -> dict[str, tuple[int, int]]:
        """(pico-USD, tokens) spent and reserved now, by account id: for `policies.budget.downgrade`. Unavailable."""
        now = self.clock()
        try:
            return await self._database.read(lambda connection: usage.used(connection, accounts, now))
        except SQLAlchemyError as error:
            raise Unavailable("budgets cannot be checked at the moment", retry_after_s=1.0) from error

    # ---------------------------------------------------------------- taking over

    async def dead(self) -> list[str]:
        """Gateways whose lease has run out, or that left something open without one."""
        now = self.clock()
        return await self._database.read(lambda connection: _dead(connection, now))

    async def links(self, gateway_id: str) -> set[str]:
        """The incarnations that may have worked for a gateway."""
        return await self._database.read(
            lambda connection: {
                row[0]
                for row in Statements(connection).run(
                    "SELECT incarnation FROM ledger_links WHERE gateway_id=?", gateway_id
                )
            }
        )

    async def compare(self, made: Mapping[str, int]) -> set[str]:
        """Hold what a journal says was made, by attempt id, against the books; the ids that they are done with.

        What was made and not charged for one that was cut short is noted as unbilled.
        """
        found = await self._database.read(lambda connection: usage.endings(connection, made))
        cut = {id: made[id] for id, source in found.items() if source == CUT}
        if cut:
            await self._database.write(
                lambda connection: compare(connection, cut, by=self.gateway_id, now=self.clock())
            )
        return {id for id in made if found.get(id) != ""}

    async def take_over(
        self, gateway_id: str, journaled: Journaled, *, complete: bool, elsewhere: Collection[str] = ()
    ) -> Taken | None:
        """Close what a dead gateway left open, each request once however many gateways try; None if it lives after all.

        See `transaction.take_over` for how.
        """
        taken = await self._database.write(
            lambda connection: take_over(
                connection,
                gateway_id,
                journaled,
                complete=complete,
                by=self.gateway_id,
                now=self.clock(),
                elsewhere=elsewhere,
            )
        )
        if taken is not None:
            self._tell(taken.alerts)
        return taken

    # ---------------------------------------------------------------- group commit

    def _future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def _answered(self, value: bool) -> asyncio.Future[bool]:
        answer = self._future()
        answer.set_result(value)
        return answer

    def _submit(self, operation: Operation) -> asyncio.Future[Any]:
        answer = self._future()
        if len(self._pending) >= self.settings.unwritten and isinstance(operation, Reserve):
            answer.set_exception(Unavailable("the ledger is behind", retry_after_s=1.0))
            return answer
        self._pending.append(_Pending(operation, answer))
        self._wake()
        return answer

    def _wake(self) -> None:
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_all(), name="ledger-commit")

    def _flush_records(self) -> None:
        if self._records:
            self._pending.extend(self._records)
            self._records = []
            self._wake()

    async def _commit_all(self) -> None:
        while self._pending:
            batch = [self._pending.popleft() for _ in range(min(len(self._pending), self.settings.batch))]
            batch = [one for one in batch if not (one.answer.cancelled() and isinstance(one.operation, Reserve))]
            if not await self._commit(batch) and self._closing:
                return

    async def _commit(self, batch: list[_Pending]) -> bool:
        """False when the database could not be written."""
        now = self.clock()
        operations = [one.operation for one in batch]
        reserving = any(isinstance(operation, Reserve) for operation in operations)
        if reserving and self._leased_until - now < self.settings.lease_s / 2:
            operations.append(Beat())  # nothing may be reserved without a lease that covers it
        # after so long without renewal another gateway may have closed everything here, the links with it
        lapsed = self._leased_until - now < self.settings.lease_s / 2
        done = {one for one, left in self._lost.items() if left.isdisjoint(self._open)}
        links = (self._links if lapsed else self._links - self._linked) - done
        try:
            outcome = await self._write(operations, links, done)
        except _UNREACHABLE as error:
            await self._put_back(batch, error)
            return False
        except Exception as error:
            await self._one_by_one(batch, error)
            return True
        if outcome.leased_until is not None:
            self._leased_until = outcome.leased_until
            self._linked |= links
            self._unlinked(done)
        for one, result in zip(batch, outcome.results, strict=False):  # a Beat of our own has no caller
            self._resolve(one, result)
        self._tell(outcome.alerts)
        closed = [operation for operation in operations if isinstance(operation, Close)]
        if closed and self.on_closed is not None:
            self.on_closed(closed)
        return True

    def _unlinked(self, incarnations: Collection[str]) -> None:
        for one in incarnations:
            self._lost.pop(one, None)
        self._links.difference_update(incarnations)
        self._linked.difference_update(incarnations)

    async def _write(self, operations: Sequence[Operation], links: Collection[str], done: Collection[str]) -> Outcome:
        def work(connection: Connection) -> Outcome:
            return commit(
                connection,
                operations,
                gateway_id=self.gateway_id,
                now=self.clock(),
                lease_s=self.settings.lease_s,
                links=links,
                unlinked=done,
            )

        try:
            return await self._database.write(work)
        except OperationalError:  # a deadlock between databases' clients, or a connection that had died: once more
            return await self._database.write(work)

    async def _one_by_one(self, batch: list[_Pending], error: Exception) -> None:
        """One bad operation spoils a transaction; alone it only spoils its own."""
        if len(batch) > 1:
            for one in batch:
                await self._commit([one])
            return
        one = batch[0]
        if not isinstance(error, SignalboxError):
            logger.error("the ledger could not do %s", type(one.operation).__name__, exc_info=error)
            error = EngineFault("the ledger failed")
        self._resolve(one, error if isinstance(one.operation, Reserve) else False)

    async def _put_back(self, batch: list[_Pending], error: Exception) -> None:
        """Callers who wait for a reservation are told; what must be written is tried again, in order."""
        logger.error("the ledger cannot write: %s", type(error).__name__)
        keep = [one for one in batch if not isinstance(one.operation, Reserve)]
        for one in batch:
            if isinstance(one.operation, Reserve):
                self._resolve(one, Unavailable("budgets cannot be checked at the moment", retry_after_s=1.0))
        self._pending.extendleft(reversed(keep))
        await asyncio.sleep(self.settings.retry_s)

    def _resolve(self, one: _Pending, result: Any) -> None:
        if isinstance(result, Reservation):
            self._open[result.id] = result
        if one.answer.cancelled():
            if isinstance(result, Reservation):
                self.release(result)
        elif isinstance(result, SignalboxError):
            one.answer.set_exception(result)
        else:
            one.answer.set_result(result)

    def _tell(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            logger.warning("%s %% of the budget %s are spent", alert.share / 100, alert.row.account)

    # ---------------------------------------------------------------- lease

    async def renew(self) -> None:
        """Renew the lease now; it is also done by itself."""
        await self._submit(Beat())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.settings.lease_s / 3)
            await self.renew()

    def _leave(self, connection: Connection) -> None:
        statements = Statements(connection)
        statements.run("DELETE FROM ledger_gateways WHERE id=?", self.gateway_id)
        statements.run("DELETE FROM ledger_links WHERE gateway_id=?", self.gateway_id)


def _dead(connection: Connection, now: float) -> list[str]:
    found = Statements(connection).run(
        "SELECT id FROM ledger_gateways WHERE lease_until < ? UNION SELECT gateway_id FROM ledger_requests"
        " WHERE state='open' AND gateway_id NOT IN (SELECT id FROM ledger_gateways) ORDER BY 1",
        now,
    )
    return [row[0] for row in found]
