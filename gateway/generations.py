"""Policy generations as the database keeps them: immutable documents, and the switches that say which of them serves.

    generation   one document, numbered, never changed. 0 is the empty one
    switch       from `activate_at` on, `active` serves, and `canary` for a `share` of the keys; the newest one counts

Queries and value types only, each query a function of an open connection. `policy_register` proposes and commits
switches, `policy_follower` obeys them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, or_, select, update

from gateway.db.schema import audit_log, policy_gateways, policy_generations, policy_sequence, policy_switches
from gateway.policy_errors import UnknownGeneration
from policies.document import FleetNames

PROPOSED, COMMITTED, REFUSED = "proposed", "committed", "refused"
# A gateway that has not been heard of for this long has stopped serving by itself, so nobody waits for it.
LEASE_S = 3.0
HEARTBEAT_S = 0.7
_FORGET_GATEWAYS_S = 3600.0
_MAX_DETAIL = 8000
# The largest number of a generation or an audit row.
MOST_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A document as it was given. `parent` is the generation that was active when it was proposed."""

    number: int
    document: str
    normalised: str
    sha256: str
    author: str
    created_at: float
    note: str
    parent: int | None


@dataclass(frozen=True, slots=True)
class Switch:
    """See the module's docstring. Times are Unix seconds; `activate_at` None until it is committed."""

    number: int
    active: int
    canary: int | None
    share: float
    action: str
    author: str
    proposed_at: float
    expires_at: float
    activate_at: float | None
    state: str

    @property
    def generations(self) -> tuple[int, ...]:
        return (self.active,) if self.canary is None else (self.active, self.canary)


@dataclass(frozen=True, slots=True)
class LiveGateway:
    """A gateway process by its last report: the last switch it is `prepared` for or refuses, the one it serves by."""

    id: str
    seen_at: float
    names: FleetNames
    prepared: int
    refusal: str | None
    serving: int
    served_at: float


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change, made or tried. outcome: "done", "refused" (the document or the request is wrong) or "failed"."""

    id: int
    at: float
    actor: str
    action: str
    target: str
    diff: str
    why: str
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A generation without its document. state: "active", "canary", "proposed", "refused" or "past"."""

    number: int
    state: str
    share: float
    sha256: str
    author: str
    created_at: float
    note: str
    parent: int | None


# ------------------------------------------------------------------------------------------------------------- sequence


def version(connection: Connection) -> int:
    """Grows with every change of the switches: the cheap question that gateways ask all the time."""
    value: int = connection.execute(select(policy_sequence.c.value)).scalar_one()
    return value


def next_version(connection: Connection) -> int:
    """First in every transaction that changes switches: until it ends no other one can."""
    bump = update(policy_sequence).where(policy_sequence.c.id == 1).values(value=policy_sequence.c.value + 1)
    value: int = connection.execute(bump.returning(policy_sequence.c.value)).scalar_one()
    return value


# ------------------------------------------------------------------------------------------------------------- switches


def latest(connection: Connection) -> Switch:
    """The newest committed switch, even if its moment has not come yet: what the next change is based on."""
    return _first_switch(connection, _committed())


def serving(connection: Connection, now: float) -> Switch:
    """The switch that counts at a moment."""
    return _first_switch(connection, _committed().where(policy_switches.c.activate_at <= now))


def ahead(connection: Connection, after: int) -> list[Switch]:
    """Committed and proposed switches after that number, oldest first."""
    query = select(policy_switches).where(policy_switches.c.number > after, policy_switches.c.state != REFUSED)
    return [_switch(row) for row in connection.execute(query.order_by(policy_switches.c.number))]


def switch(connection: Connection, number: int) -> Switch:
    return _first_switch(connection, select(policy_switches).where(policy_switches.c.number == number))


def served(connection: Connection, generation: int) -> list[tuple[float, float]]:
    """The times at which a generation was active or a canary, oldest first; each ends when the next switch counts."""
    rows = connection.execute(_committed().order_by(policy_switches.c.number)).all()
    switches = [_switch(row) for row in rows]
    ends = [one.activate_at or 0.0 for one in switches[1:]] + [math.inf]
    return [
        (one.activate_at or 0.0, end) for one, end in zip(switches, ends, strict=True) if generation in one.generations
    ]


def propose(connection: Connection, change: Switch) -> None:
    connection.execute(policy_switches.insert().values({name: getattr(change, name) for name in Switch.__slots__}))


def settle(connection: Connection, number: int, state: str, activate_at: float | None = None) -> None:
    """End a proposal: committed for a moment, or refused."""
    values = {"state": state, "activate_at": activate_at}
    connection.execute(update(policy_switches).where(policy_switches.c.number == number).values(values))


def _committed() -> Select[Any]:
    return select(policy_switches).where(policy_switches.c.state == COMMITTED)


def _first_switch(connection: Connection, query: Select[Any]) -> Switch:
    row = connection.execute(query.order_by(policy_switches.c.number.desc()).limit(1)).one()
    return _switch(row)


def _switch(row: Row[Any]) -> Switch:
    return Switch(**row._mapping)


# ---------------------------------------------------------------------------------------------------------- generations


def stored(connection: Connection, numbers: Iterable[int]) -> dict[int, StoredGeneration]:
    """The generations of those numbers; UnknownGeneration."""
    wanted = set(numbers)
    storable = {number for number in wanted if abs(number) <= MOST_ID}  # a database would fail at the others
    rows = connection.execute(select(policy_generations).where(policy_generations.c.number.in_(storable)))
    found = {row.number: StoredGeneration(**row._mapping) for row in rows}
    if missing := sorted(wanted - set(found)):
        raise UnknownGeneration(f"there is no policy generation {missing[0]}", param="generation")
    return found


def add(connection: Connection, generation: StoredGeneration) -> None:
    values = {name: getattr(generation, name) for name in StoredGeneration.__slots__}
    connection.execute(policy_generations.insert().values(values))


def next_generation(connection: Connection) -> int:
    """The number for a new generation; call after `next_version`."""
    newest: int = connection.execute(select(func.max(policy_generations.c.number))).scalar_one()
    return newest + 1


def history(connection: Connection, limit: int) -> list[HistoryEntry]:
    """The newest generations, newest first."""
    columns = [column for column in policy_generations.c if column.name not in ("document", "normalised")]
    rows = connection.execute(select(*columns).order_by(policy_generations.c.number.desc()).limit(limit)).all()
    now = latest(connection)
    if not rows:
        return []
    oldest = min(row.number for row in rows)
    concerned = or_(policy_switches.c.active >= oldest, policy_switches.c.canary >= oldest)
    states: dict[int, str] = {}
    for one in map(_switch, connection.execute(select(policy_switches).where(concerned))):
        for number in one.generations:
            if one.state != REFUSED or number not in states:
                states[number] = "past" if one.state == COMMITTED else one.state
    states[now.active] = "active"
    if now.canary is not None:
        states[now.canary] = "canary"
    shares = {now.active: 1.0 - now.share, **({now.canary: now.share} if now.canary is not None else {})}
    return [
        HistoryEntry(**row._mapping, state=states.get(row.number, "past"), share=shares.get(row.number, 0.0))
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------------------- gateways


def live_gateways(connection: Connection, now: float) -> list[LiveGateway]:
    query = select(policy_gateways).where(policy_gateways.c.seen_at > now - LEASE_S)
    return [_gateway(row._mapping) for row in connection.execute(query.order_by(policy_gateways.c.id))]


def report(connection: Connection, gateway: LiveGateway) -> None:
    """Write a gateway's row."""
    values = {name: getattr(gateway, name) for name in LiveGateway.__slots__ if name != "id"}
    values["names"] = json.dumps(asdict(gateway.names))
    own = policy_gateways.c.id == gateway.id
    if not connection.execute(update(policy_gateways).where(own).values(values)).rowcount:
        connection.execute(policy_gateways.insert().values(id=gateway.id, **values))


def sign_off(connection: Connection, gateway_id: str) -> None:
    """Remove a gateway that stops, and those that have long been dead."""
    gone = (policy_gateways.c.id == gateway_id) | (policy_gateways.c.seen_at < time.time() - _FORGET_GATEWAYS_S)
    connection.execute(delete(policy_gateways).where(gone))


def _gateway(row: Mapping[Any, Any]) -> LiveGateway:
    names = {field: tuple(values) for field, values in json.loads(row["names"]).items()}
    return LiveGateway(**{**row, "names": FleetNames(**names)})


# ---------------------------------------------------------------------------------------------------------------- audit


def audit(
    connection: Connection,
    *,
    actor: str,
    action: str,
    target: str,
    why: str,
    diff: Sequence[str] = (),
    outcome: str = "done",
    detail: str = "",
) -> None:
    values = {"at": time.time(), "actor": actor, "action": action, "target": target, "why": why, "outcome": outcome}
    connection.execute(audit_log.insert().values(values | {"diff": "\n".join(diff), "detail": detail[:_MAX_DETAIL]}))


def audit_entries(connection: Connection, limit: int, before: int | None = None) -> list[AuditEntry]:
    """The newest entries, newest first; with `before`, those older than that id."""
    query = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit_log.c.id < before)
    return [AuditEntry(**row._mapping) for row in connection.execute(query)]
