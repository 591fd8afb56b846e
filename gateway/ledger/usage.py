"""Reading the books, and keeping them bounded. Blocking: for the command line, and for `Database.read` and `write`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection

from gateway.ledger.sql import Statements
from gateway.ledger.work import REQUEST_COLUMNS, RequestRow
from policies.budget import Account

# Parameters in one statement.
_MOST_IDS = 500


class Total(NamedTuple):
    """One key's use of one model on a day ("2026-11-24") or in a month ("2026-11"). cost_usd is in pico-dollars.

    unbilled_tokens: made for it, and paid by nobody.
    """

    period: str
    key: str
    team: str
    model: str
    requests: int
    estimated: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_usd: int
    unbilled_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One budget in one window, in pico-dollars and tokens."""

    window: str
    key: str | None
    team: str | None
    model: str | None
    starts: int
    ends: int | None
    spent_usd: int
    reserved_usd: int
    cap_usd: int | None
    spent_tokens: int
    reserved_tokens: int
    cap_tokens: int | None
    overrun_usd: int
    overrun_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """days: before daily totals become monthly ones. request_s, requests: how long, and how many, closed requests are
    kept one by one. account_s: how long an account is kept after its window, a delivered alert likewise.
    """

    days: int = 93
    request_s: float = 7 * 86400.0
    requests: int = 100_000
    account_s: float = 35 * 86400.0


def totals(connection: Connection, *, since: str = "", until: str = "9999") -> list[Total]:
    """By period, key, team and model; `since` and `until` are periods or their beginnings, both included."""
    rows = Statements(connection).run(
        f"SELECT {', '.join(Total._fields)} FROM ledger_usage WHERE period >= ? AND period <= ?"
        " ORDER BY period, key, team, model",
        since,
        until + "~",  # sorts after every longer period that begins so
    )
    return [Total._make(row) for row in rows]


def standings(connection: Connection, now: float) -> list[Standing]:
    """Every budget's current window that was used at all."""
    columns = (
        "starts, ends, spent_usd, reserved_usd, cap_usd, spent_tokens, reserved_tokens, cap_tokens, overrun_usd,"
        " overrun_tokens"
    )
    rows = Statements(connection).run(
        f"SELECT account, {columns} FROM ledger_accounts WHERE ends IS NULL OR ends > ? ORDER BY id", int(now)
    )
    found = []
    for account, *values in rows:
        window, key, team, model = msgspec.json.decode(account)
        numbers = dict(zip(columns.split(", "), values, strict=True))
        found.append(Standing(window=window, key=key, team=team, model=model, **numbers))
    return found


def used(connection: Connection, accounts: Sequence[Account], now: float) -> dict[str, tuple[int, int]]:
    """(pico-USD, tokens) spent and reserved in each account's current window; what was never used is not there."""
    marks = ", ".join("?" * len(accounts))
    rows = Statements(connection).run(
        "SELECT account, spent_usd + reserved_usd, spent_tokens + reserved_tokens FROM ledger_accounts"
        f" WHERE account IN ({marks}) AND starts <= ? AND (ends IS NULL OR ends > ?)",
        *(account.id for account in accounts),
        int(now),
        int(now),
    )
    return {account: (usd, tokens) for account, usd, tokens in rows}


def endings(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """Where the usage of those attempts came from, "" of open ones; what is not on the books is not there."""
    wanted, found = list(ids), dict[str, str]()
    for at in range(0, len(wanted), _MOST_IDS):
        part = wanted[at : at + _MOST_IDS]
        marks = ",".join("?" * len(part))
        rows = Statements(connection).run(
            f"SELECT id, CASE state WHEN 'open' THEN '' ELSE source END FROM ledger_requests WHERE id IN ({marks})",
            *part,
        )
        found.update(dict(rows))
    return found


def request(connection: Connection, id: str) -> list[RequestRow]:
    """All attempts of a request, as the ledger knows them: reservation and settlement for `explain`."""
    rows = Statements(connection).run(
        f"SELECT {REQUEST_COLUMNS} FROM ledger_requests WHERE id=? OR id LIKE ? ESCAPE '!' OR id LIKE ? ESCAPE '!'"
        " ORDER BY began_at, id",
        id,
        _escaped(id) + "-r%",
        _escaped(id) + "/%",
    )
    return [RequestRow._make(row) for row in rows]


def prune(connection: Connection, now: float, retention: Retention | None = None) -> None:
    """Drop what is past its time. Nothing that is open is touched, and no total changes."""
    keep, statements = retention or Retention(), Statements(connection)
    oldest_day = (datetime.fromtimestamp(now, UTC) - timedelta(days=keep.days)).strftime("%Y-%m-%d")
    amounts = Total._fields[4:]
    rows = statements.for_update(
        f"SELECT {', '.join(Total._fields)} FROM ledger_usage WHERE LENGTH(period) = 10 AND period < ?", oldest_day
    )
    months: dict[tuple[str, ...], list[int]] = {}
    for period, key, team, model, *numbers in rows:
        total = months.setdefault((period[:7], key, team, model), [0] * len(amounts))
        total[:] = [have + more for have, more in zip(total, numbers, strict=True)]
    statements.many(
        f"INSERT INTO ledger_usage ({', '.join(Total._fields)}) VALUES ({', '.join('?' * len(Total._fields))})"
        " ON CONFLICT (period, key, team, model) DO UPDATE SET "
        + ", ".join(f"{name}=ledger_usage.{name}+excluded.{name}" for name in amounts),
        [(*who, *numbers) for who, numbers in sorted(months.items())],
    )
    statements.many(
        "DELETE FROM ledger_usage WHERE period=? AND key=? AND team=? AND model=?", [row[:4] for row in rows]
    )
    statements.run("DELETE FROM ledger_requests WHERE ended_at < ?", now - keep.request_s)
    statements.run(
        "DELETE FROM ledger_requests WHERE ended_at < (SELECT MIN(ended_at) FROM (SELECT ended_at FROM ledger_requests"
        " WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT ?) AS newest)",
        keep.requests,
    )
    long_ago = now - keep.account_s
    statements.run(
        "DELETE FROM ledger_accounts WHERE ends < ? AND reserved_usd = 0 AND reserved_tokens = 0", int(long_ago)
    )
    # a gate that nobody passed for a day is full, as a new one would be
    statements.run(
        "DELETE FROM ledger_gates WHERE at_us < ? AND in_flight = 0 AND promises = '[]'", int((now - 86400) * 1e6)
    )
    statements.run("DELETE FROM ledger_events WHERE next_at IS NULL AND created_at < ?", long_ago)


def _escaped(text: str) -> str:
    return text.replace("!", "!!").replace("%", "!%").replace("_", "!_")
