"""Changes what serves: validate, publish, roll back, canary. Blocking, for command line and the admin API's threads.

No two gateways may serve by different generations for longer than their clocks differ, so a change has two phases:

    propose ──► every live gateway builds the generation and says so, or why it cannot
            ──► commit with a moment a little ahead ──► every gateway turns at that moment
    a refusal, or a gateway that is silent while it lives ──► the proposal is refused; everything is as it was

A gateway that dies is waited for no longer than its lease; one that starts meanwhile reads the database. A proposal
whose publisher dies expires. Every attempt leaves an audit row, in the transaction of the change itself.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from sqlalchemy import Connection

from gateway import generations, proposals
from gateway.db.database import open_engine, reading
from gateway.generations import (
    LEASE_S,
    AuditEntry,
    HistoryEntry,
    LiveGateway,
    StoredGeneration,
    Switch,
)
from gateway.policy_errors import PolicyConflict, PublishRefused, UnknownGeneration
from gateway.proposals import PREPARE_TIMEOUT_S, Plan
from policies.document import FleetNames, PolicyDocument, checked, parse
from policies.document_schema import changes
from policies.yaml_text import DocumentError
from replicas.protocol import InvalidRequest

T = TypeVar("T")

_LOOK_S = 0.01
# The moment of a switch lies this far ahead: ten times as far as a gateway with a switch pending looks.
_NOTICE_S = 0.2


@dataclass(frozen=True, slots=True)
class Change:
    """A change that is done. late_s: how long after its moment the last gateway learned of it; 0 is the rule.

    unanswered: gateways that died, or have not confirmed yet, after the commit.
    """

    switch: Switch
    diff: tuple[str, ...]
    gateways: tuple[str, ...]
    late_s: float
    unanswered: tuple[str, ...] = ()


class PolicyRegister:
    """The policies of one database.

    names: the fleet's, to check documents against while no gateway lives. predictors: the folder of the gateways'
    predictors, where it is on this machine. Safe to use from several threads. Use as a context manager, or `close` it.
    """

    def __init__(self, database_url: str, *, names: FleetNames | None = None, predictors: Path | None = None) -> None:
        self._engine = open_engine(database_url)
        self._names = names
        self._predictors = predictors
        self._stopping = threading.Event()

    def __enter__(self) -> PolicyRegister:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def stop(self) -> None:
        """Make a change that still waits for gateways give up, from any thread."""
        self._stopping.set()

    def close(self) -> None:
        self._engine.dispose()

    # ------------------------------------------------------------------------------------------------------- looking

    def validate(self, text: str, name: str = "policy") -> PolicyDocument:
        """The document; DocumentError. Names are checked against every live gateway's fleet."""
        gateways = self.read(lambda connection: generations.live_gateways(connection, time.time()))
        names = self._names if not gateways else None
        document = checked(text, name, names=names, predictors=self._predictors)
        for theirs in {gateway.names for gateway in gateways}:
            parse(text, name, names=theirs)
        return document

    def diff(self, text: str, name: str = "policy") -> list[str]:
        """What the document would change of the active one."""
        return changes(self.active().normalised, self.validate(text, name).normalised())

    def compare(self, before: int, after: int) -> list[str]:
        """What differs between two generations; UnknownGeneration."""
        found = self.read(lambda connection: generations.stored(connection, (before, after)))
        return changes(found[before].normalised, found[after].normalised)

    def state(self) -> Switch:
        """The newest committed switch."""
        return self.read(generations.latest)

    def active(self) -> StoredGeneration:
        return self.show(self.state().active)

    def show(self, number: int) -> StoredGeneration:
        """One generation with its document; UnknownGeneration."""
        return self.read(lambda connection: generations.stored(connection, (number,)))[number]

    def history(self, limit: int = 50) -> list[HistoryEntry]:
        return self.read(lambda connection: generations.history(connection, limit))

    def audit(self, limit: int = 50, before: int | None = None) -> list[AuditEntry]:
        return self.read(lambda connection: generations.audit_entries(connection, limit, before))

    def gateways(self) -> list[LiveGateway]:
        return self.read(lambda connection: generations.live_gateways(connection, time.time()))

    # ------------------------------------------------------------------------------------------------------ changing

    def publish(
        self,
        text: str,
        *,
        author: str,
        why: str = "",
        name: str = "policy",
        canary: float | None = None,
        parent: int | None = None,
        detail: str = "",
    ) -> Change:
        """A new generation for everybody, or as a canary for a share of the keys.

        canary: the share; by default what the document says of itself, and 1 is everybody. parent: refuse with
        PolicyConflict unless this generation is the active one. detail: for the audit log, what a gate said. Raises
        DocumentError, PolicyConflict, PublishRefused.
        """
        _check_words(author, why)
        try:
            document = self.validate(text, name)
        except DocumentError as error:
            self.note_refusal("publish", author, why, error.message)
            raise
        share = canary if canary is not None else document.canary.share if document.canary else 1.0
        _check_share(share)

        def plan(connection: Connection, now: Switch) -> Plan:
            if parent is not None and parent != now.active:
                raise PolicyConflict(f"generation {now.active} is active, not {parent}", param="parent")
            before = generations.stored(connection, (now.active,))[now.active]
            new = StoredGeneration(
                number=generations.next_generation(connection),
                document=text,
                normalised=document.normalised(),
                sha256=hashlib.sha256(text.encode()).hexdigest(),
                author=author,
                created_at=time.time(),
                note=why,
                parent=now.active,
            )
            diff = tuple(changes(before.normalised, new.normalised))
            if share < 1:
                return Plan(now.active, new.number, share, new, diff, detail)
            return Plan(new.number, new=new, diff=diff, detail=detail)

        return self._change("publish", author, why, plan)

    def rollback(self, *, author: str, why: str = "", to: int | None = None) -> Change:
        """Back to generation `to`; by default end the canary if there is one, else to the active one's parent."""

        def plan(connection: Connection, now: Switch) -> Plan:
            current = generations.stored(connection, (now.active,))[now.active]
            number = to
            if number is None:
                number = now.active if now.canary is not None else current.parent
            if number is None:
                raise InvalidRequest("there is nothing to roll back to: the first generation is active")
            wanted = generations.stored(connection, (number,))[number]
            ended = [f"- canary: {now.canary}"] if now.canary is not None else []
            return Plan(number, diff=(*ended, *changes(current.normalised, wanted.normalised)))

        return self._change("rollback", author, why, plan)

    def promote(self, *, author: str, why: str = "", share: float | None = None) -> Change:
        """The canary for everybody, or for another share of the keys."""
        if share is not None:
            _check_share(share)

        def plan(connection: Connection, now: Switch) -> Plan:
            canary = _canary(now)
            if share is not None and share < 1:
                return Plan(now.active, canary, share, diff=(f"~ share: {now.share:g} -> {share:g}",))
            found = generations.stored(connection, (now.active, canary))
            return Plan(canary, diff=tuple(changes(found[now.active].normalised, found[canary].normalised)))

        return self._change("promote", author, why, plan)

    def cancel(self, *, author: str, why: str = "") -> Change:
        """End the canary; the active generation serves everybody."""

        def plan(_: Connection, now: Switch) -> Plan:
            return Plan(now.active, diff=(f"- canary: {_canary(now)}",))

        return self._change("cancel", author, why, plan)

    # --------------------------------------------------------------------------------------------------- two phases

    def _change(self, action: str, author: str, why: str, plan: Callable[[Connection, Switch], Plan]) -> Change:
        _check_words(author, why)
        try:
            proposal, made = self._write(lambda connection: proposals.propose(connection, action, author, plan))
        except (InvalidRequest, PolicyConflict, UnknownGeneration) as error:
            self.note_refusal(action, author, why, error.message)
            raise
        try:
            committed = self._decide(proposal, made, why)
        except BaseException as error:  # also Ctrl-C: the proposal must not stand in the way of the next one
            reason = str(error) or type(error).__name__
            self._write(lambda connection: proposals.refuse(connection, proposal, made, why, reason))
            raise
        return self._await_served(committed, made)

    def _decide(self, proposal: Switch, made: Plan, why: str) -> Switch:
        commit = partial(proposals.commit, proposal=proposal, made=made, why=why, notice=_NOTICE_S)
        self._await_prepared(proposal)
        while (committed := self._write(commit)) is None:  # a gateway has come meanwhile
            self._await_prepared(proposal)
        return committed

    def _await_prepared(self, proposal: Switch) -> None:
        """Return when every live gateway is prepared; PublishRefused when one is not."""
        began = time.monotonic()
        while waiting := self._unprepared(proposal):
            if time.monotonic() - began > PREPARE_TIMEOUT_S:
                raise PublishRefused(f"gateway {waiting[0]} did not answer within {PREPARE_TIMEOUT_S:g} s")
            if self._stopping.wait(_LOOK_S):
                raise PublishRefused("the process that was publishing it is stopping")

    def _unprepared(self, proposal: Switch) -> list[str]:
        gateways = self.gateways()
        for gateway in gateways:
            if gateway.prepared == proposal.number and gateway.refusal is not None:
                raise PublishRefused(f"gateway {gateway.id} cannot serve it: {gateway.refusal}")
        return [gateway.id for gateway in gateways if gateway.prepared < proposal.number]

    def _await_served(self, committed: Switch, made: Plan) -> Change:
        assert committed.activate_at is not None, "it was committed"
        give_up = committed.activate_at + 2 * LEASE_S
        everybody: dict[str, LiveGateway] = {}
        while True:
            everybody |= {gateway.id: gateway for gateway in self.gateways()}
            alive = time.time() - LEASE_S
            late = [one.id for one in everybody.values() if one.serving < committed.number]
            if not any(everybody[one].seen_at > alive for one in late) or time.time() > give_up:
                break
            if self._stopping.wait(_LOOK_S):
                break
        served = [one for one in everybody.values() if one.serving == committed.number]
        late_s = max((one.served_at - committed.activate_at for one in served), default=0.0)
        remaining = committed.activate_at - time.time()
        if remaining > 0:
            time.sleep(remaining)
        return Change(committed, made.diff, tuple(sorted(everybody)), max(0.0, late_s), tuple(sorted(late)))

    def switches(self, generation: int) -> list[tuple[float, float]]:
        """From when to when the generation served somebody, in Unix seconds; infinity while it still does."""
        return self.read(lambda connection: generations.served(connection, generation))

    def note_refusal(self, action: str, author: str, why: str, reason: str) -> None:
        """An audit row of what was not even proposed."""
        self._write(
            lambda connection: generations.audit(
                connection, actor=author, action=action, target="", why=why, outcome="refused", detail=reason
            )
        )

    def read(self, query: Callable[[Connection], T]) -> T:
        with reading(self._engine).begin() as connection:
            return query(connection)

    def _write(self, change: Callable[[Connection], T]) -> T:
        with self._engine.begin() as connection:
            return change(connection)


def _canary(now: Switch) -> int:
    if now.canary is None:
        raise InvalidRequest("there is no canary")
    return now.canary


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise InvalidRequest(f"a share must be above 0 and at most 1, got {share!r}", param="canary")


def _check_words(author: str, why: str) -> None:
    if not (0 < len(author) <= 128 and author.isprintable()):
        raise InvalidRequest("the author must have 1 to 128 printable characters", param="author")
    if len(why) > 2000 or not why.translate({9: "", 10: "", 13: ""}).isprintable():
        raise InvalidRequest("why must have at most 2000 printable characters", param="why")
