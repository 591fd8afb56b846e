"""One transaction of the ledger: everything that arrived together, in a handful of statements.

    lock the open requests that end ─► lock accounts and gates ─► decide in memory ─► write everything back

Requests that end come first, so what they give back is there for those that begin. Every account and gate that is
looked at is locked, so deciding in memory is deciding in the database: `spent + reserved <= cap` holds for every other
transaction before and after, in whichever process. A request leaves the state "open" once, because only a locked
"open" row is closed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from gateway.ledger.entries import JOURNAL, RESERVED, Beat, Close, Ending, Operation, Record, Reserve, spend_of_note
from gateway.ledger.work import NOTHING_USED, Alert, RequestRow, Work
from replicas.protocol import Usage

# Usage from journals by attempt id, each with its note (see `entries.note`).
Journaled = Mapping[str, tuple[Usage, str]]


@dataclass(slots=True)
class Outcome:
    """Results in the order of the operations; a refusal is its exception. Alerts are for after the commit."""

    results: list[Any]
    alerts: list[Alert] = field(default_factory=list)
    leased_until: float | None = None


def commit(
    connection: Connection,
    operations: Sequence[Operation],
    *,
    gateway_id: str,
    now: float,
    lease_s: float,
    links: Collection[str] = (),
    unlinked: Collection[str] = (),
) -> Outcome:
    """Do all operations within the connection's transaction. If there is a Beat among them, the lease is renewed, and
    it is noted which incarnations may (`links`) and no longer can (`unlinked`) have worked for the gateway.
    """
    work = Work(connection, gateway_id, now)
    outcome = Outcome([None] * len(operations))
    if any(isinstance(operation, Beat) for operation in operations):
        outcome.leased_until = now + lease_s
        work.renew(outcome.leased_until, links, unlinked)
    open_rows = work.open_rows(operation.id for operation in operations if isinstance(operation, Close))
    work.load(open_rows.values(), [operation for operation in operations if isinstance(operation, Reserve)])
    for number, operation in enumerate(operations):
        if isinstance(operation, Close):
            row = open_rows.pop(operation.id, None)  # taken out, so that a second Close finds nothing
            if row is not None:
                work.close(row, operation.ending)
            outcome.results[number] = row is not None
    for number, operation in enumerate(operations):
        if isinstance(operation, Reserve):
            outcome.results[number] = work.reserve(operation)
    records = {number: operation for number, operation in enumerate(operations) if isinstance(operation, Record)}
    if records:
        new = work.record(list(records.values()))
        for number, record in records.items():
            outcome.results[number] = record.spend.id in new
    outcome.alerts = work.write()
    return outcome


@dataclass(frozen=True, slots=True)
class Taken:
    """How many requests of a dead gateway were settled from a journal, charged as reserved, released because they never
    ran, and recorded although nothing was reserved for them.
    """

    settled: int = 0
    charged: int = 0
    released: int = 0
    recorded: int = 0
    alerts: tuple[Alert, ...] = ()


def take_over(
    connection: Connection,
    dead: str,
    journaled: Journaled,
    *,
    complete: bool,
    by: str,
    now: float,
    elsewhere: Collection[str] = (),
) -> Taken | None:
    """Close what a dead gateway left open; None if its lease is good.

    complete: no journal but those read can know of its requests, so one without an entry never ran and is released;
    otherwise it is charged as reserved and marked as estimated, as are requests to models `elsewhere`, which keep no
    journals. Usage that nothing was reserved for is recorded by its note, unless the dead gateway had recorded it.
    """
    work = Work(connection, by, now)
    lease = work.statements.for_update("SELECT lease_until FROM ledger_gateways WHERE id=?", dead)
    if lease and lease[0][0] >= now:
        return None
    rows = work.open_rows_of(dead)
    work.load(rows.values(), ())
    counts = {"settled": 0, "charged": 0, "released": 0}
    for row in rows.values():
        kind, ending = _ending(row, journaled, complete and row.model not in elsewhere)
        counts[kind] += 1
        work.close(row, ending)
    unreserved = []
    for id, (usage, note) in journaled.items():
        spend = spend_of_note(id, note, usage) if id not in rows and usage != NOTHING_USED else None
        if spend is not None:
            unreserved.append(Record(spend, Ending(usage=usage, source=JOURNAL), now))
    recorded = work.record(unreserved) if unreserved else set()
    alerts = work.write()
    work.statements.run("DELETE FROM ledger_gateways WHERE id=?", dead)
    work.statements.run("DELETE FROM ledger_links WHERE gateway_id=?", dead)
    return Taken(**counts, recorded=len(recorded), alerts=tuple(alerts))


def compare(connection: Connection, made: Mapping[str, int], *, by: str, now: float) -> None:
    """Of attempts that were cut short, note what was made and not charged, each once however many gateways try."""
    work = Work(connection, by, now)
    work.compare(made)
    work.write()


def _ending(row: RequestRow, journaled: Journaled, complete: bool) -> tuple[str, Ending]:
    if row.id in journaled:
        usage = journaled[row.id][0]
        if usage == NOTHING_USED:
            return "released", Ending(usage=None, source=JOURNAL)
        return "settled", Ending(usage=usage, source=JOURNAL)
    if complete:
        return "released", Ending(usage=None, source=JOURNAL)
    usage = Usage(prompt_tokens=row.prompt_tokens, completion_tokens=row.max_tokens)
    return "charged", Ending(usage=usage, estimated=True, source=RESERVED)
