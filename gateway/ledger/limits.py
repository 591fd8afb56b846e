"""The gates of `policies.limits` kept in the database, so that several gateways are one limit.

The arithmetic is theirs; here is only how a gate is read, locked and written back within a transaction.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from gateway.ledger.sql import Row, Statements
from policies.budget import Scope
from policies.limits import Gate, Promise, RateLimit

_COLUMNS = "id, at_us, requests, tokens, in_flight, promises"
_NOTHING = "[]"


def gate_id(limit: RateLimit) -> str:
    scope = limit.scope
    return msgspec.json.encode([scope.key, scope.team, scope.model]).decode()


def limit_of(id: str, requests: int | None, tokens: int | None, concurrency: int | None) -> RateLimit:
    """The limit that a reservation was made under, from what its row remembers."""
    key, team, model = msgspec.json.decode(id)
    scope = Scope(key=key, team=team, model=model)
    return RateLimit(scope=scope, requests=requests, tokens=tokens, concurrency=concurrency)


class Gates:
    """The gates that a transaction touches, by id."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._loaded: dict[str, Row] = {}
        self.gates: dict[str, Gate] = {}

    def load(self, ids: Iterable[str]) -> None:
        wanted = set(ids)
        if not wanted:
            return
        self._lock(wanted)
        missing = sorted(wanted - self.gates.keys())
        if missing:
            fresh = [(id, 0, None, None, 0, _NOTHING) for id in missing]
            self._statements.inserted("ledger_gates", _COLUMNS, fresh)
            self._lock(missing)  # another process may have been first

    def _lock(self, ids: Iterable[str]) -> None:
        for row in self._statements.locked(_COLUMNS, "ledger_gates", ids):
            self._loaded[row[0]] = row
            self.gates[row[0]] = _gate(row)

    def write(self) -> None:
        rows = [_row(id, gate) for id, gate in self.gates.items()]
        self._statements.many(
            "UPDATE ledger_gates SET at_us=?, requests=?, tokens=?, in_flight=?, promises=? WHERE id=?",
            [(*row[1:], row[0]) for row in rows if row != self._loaded[row[0]]],
        )


def _gate(row: Row) -> Gate:
    _, at_us, requests, level, in_flight, promises = row
    gate = Gate(at_us=at_us, requests=requests, tokens=level, in_flight=in_flight)
    if promises != _NOTHING:
        for due_us, claimant, tokens in msgspec.json.decode(promises):
            promise = Promise(due_us, bytes.fromhex(claimant), tokens)
            (gate.held if due_us <= gate.at_us else gate.promised).append(promise)
    return gate


def _row(id: str, gate: Gate) -> Row:
    promises = _NOTHING
    if gate.held or gate.promised:
        entries = [(p.due_us, p.claimant.hex(), p.tokens) for p in (*gate.held, *gate.promised)]
        promises = msgspec.json.encode(entries).decode()
    return id, gate.at_us, gate.requests, gate.tokens, gate.in_flight, promises
