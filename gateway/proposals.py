"""The transactions of a change: propose, commit, refuse. Each takes the sequence first, so one happens at a time.

A proposal stands for a bounded time and no second one beside it. How it ends is an audit row in the same transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from gateway import generations
from gateway.generations import COMMITTED, LEASE_S, PROPOSED, REFUSED, StoredGeneration, Switch
from gateway.policy_errors import PolicyConflict, PublishRefused

PREPARE_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a change wants, worked out inside the transaction that proposes it."""

    active: int
    canary: int | None = None
    share: float = 0.0
    new: StoredGeneration | None = None
    diff: tuple[str, ...] = ()
    detail: str = ""

    @property
    def target(self) -> int:
        return self.active if self.canary is None else self.canary


def propose(
    connection: Connection, action: str, author: str, plan: Callable[[Connection, Switch], Plan]
) -> tuple[Switch, Plan]:
    number = generations.next_version(connection)
    now, at = generations.latest(connection), time.time()
    for open_one in generations.ahead(connection, now.number):
        if open_one.expires_at > at:
            raise PolicyConflict(f"{open_one.author} is changing the policy at this moment ({open_one.action})")
        _abandon(connection, open_one)
    made = plan(connection, now)
    if made.new is not None:
        generations.add(connection, made.new)
    proposal = Switch(
        number=number,
        active=made.active,
        canary=made.canary,
        share=made.share,
        action=action,
        author=author,
        proposed_at=at,
        expires_at=at + PREPARE_TIMEOUT_S + LEASE_S,
        activate_at=None,
        state=PROPOSED,
    )
    generations.propose(connection, proposal)
    return proposal, made


def _abandon(connection: Connection, proposal: Switch) -> None:
    generations.settle(connection, proposal.number, REFUSED)
    generations.audit(
        connection,
        actor=proposal.author,
        action=proposal.action,
        target=_target(proposal),
        why="",
        outcome="failed",
        detail="whoever proposed it ended before it was decided",
    )


def refuse(connection: Connection, proposal: Switch, made: Plan, why: str, reason: str) -> None:
    generations.next_version(connection)
    if generations.switch(connection, proposal.number).state != PROPOSED:
        return  # it had expired and somebody else has said so
    generations.settle(connection, proposal.number, REFUSED)
    note(connection, proposal, made, why, outcome="failed", detail=reason)


def commit(connection: Connection, proposal: Switch, made: Plan, why: str, notice: float) -> Switch | None:
    """The committed switch; None when a gateway that has come meanwhile is not prepared or refuses it.

    PublishRefused when it is too late.
    """
    generations.next_version(connection)
    at = time.time()
    if generations.switch(connection, proposal.number).state != PROPOSED or at > proposal.expires_at:
        raise PublishRefused("it took too long and was given up")
    gateways = generations.live_gateways(connection, at)
    if any(one.prepared < proposal.number or (one.refusal and one.prepared == proposal.number) for one in gateways):
        return None
    before = generations.latest(connection).activate_at or 0.0
    moment = max(at + notice if gateways else at, before)
    generations.settle(connection, proposal.number, COMMITTED, moment)
    note(connection, proposal, made, why, detail=made.detail)
    return replace(proposal, state=COMMITTED, activate_at=moment)


def note(
    connection: Connection, proposal: Switch, made: Plan, why: str, outcome: str = "done", detail: str = ""
) -> None:
    generations.audit(
        connection,
        actor=proposal.author,
        action=proposal.action,
        target=_target(proposal),
        why=why,
        diff=made.diff,
        outcome=outcome,
        detail=detail,
    )


def _target(switch: Switch) -> str:
    if switch.canary is None:
        return f"generation {switch.active}"
    return f"generation {switch.canary} for {switch.share:.4g} of the keys"
