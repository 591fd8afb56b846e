"""Accounts as one transaction sees them: loaded and locked, changed in memory, written back if changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter

from gateway.ledger.sql import Row, Statements
from policies.budget import BASIS_POINTS, Account


@dataclass(slots=True)
class AccountRow:
    """One row of ledger_accounts, fields in the columns' order."""

    id: str
    account: str
    starts: int
    ends: int | None
    spent_usd: int = 0
    spent_tokens: int = 0
    reserved_usd: int = 0
    reserved_tokens: int = 0
    overrun_usd: int = 0
    overrun_tokens: int = 0
    cap_usd: int | None = None
    cap_tokens: int | None = None
    alerts: str = ""
    webhook: str | None = None
    alerted: int = 0

    def has_room(self, usd: int, tokens: int) -> bool:
        return (self.cap_usd is None or self.spent_usd + self.reserved_usd + usd <= self.cap_usd) and (
            self.cap_tokens is None or self.spent_tokens + self.reserved_tokens + tokens <= self.cap_tokens
        )

    def reserve(self, usd: int, tokens: int) -> None:
        self.reserved_usd += usd
        self.reserved_tokens += tokens

    def close(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """Give back what was reserved and charge what was used; what it was more is noted as overrun."""
        self.reserved_usd -= reserved[0]
        self.reserved_tokens -= reserved[1]
        assert self.reserved_usd >= 0, "an account gave back more money than was reserved in it"
        assert self.reserved_tokens >= 0, "an account gave back more tokens than were reserved in it"
        self.spent_usd += used[0]
        self.spent_tokens += used[1]
        self.overrun_usd += max(0, used[0] - reserved[0])
        self.overrun_tokens += max(0, used[1] - reserved[1])

    def due_alerts(self) -> list[int]:
        """Alerts that spending has reached and that were not raised yet in this window, lowest first."""
        if not self.alerts:
            return []
        amounts = ((self.spent_usd, self.cap_usd), (self.spent_tokens, self.cap_tokens))
        return sorted(
            at
            for at in map(int, self.alerts.split(","))
            if at > self.alerted and any(cap is not None and spent * BASIS_POINTS >= cap * at for spent, cap in amounts)
        )


_NAMES = tuple(field.name for field in fields(AccountRow))
_COLUMNS = ", ".join(_NAMES)
_values = attrgetter(*_NAMES)
# What may change, from the first such column on.
_FIRST_CHANGING = _NAMES.index("spent_usd")
_UPDATE = f"UPDATE ledger_accounts SET {', '.join(f'{name}=?' for name in _NAMES[_FIRST_CHANGING:])} WHERE id=?"


def account_row_id(account: str, starts: int) -> str:
    return f"{account}@{starts}"


class Accounts:
    """The accounts that a transaction touches, by row id."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._loaded: dict[str, Row] = {}
        self.rows: dict[str, AccountRow] = {}

    def load(self, existing: Iterable[str], wanted: Mapping[str, tuple[Account, float]]) -> None:
        """`existing` must be there; `wanted`, by row id, is made if new: account and a time in its window."""
        ids = {*existing, *wanted}
        if not ids:
            return
        self._lock(ids)
        missing = sorted(wanted.keys() - self.rows.keys())
        if missing:
            fresh = [_new_row(row_id, *wanted[row_id]) for row_id in missing]
            self._statements.inserted("ledger_accounts", _COLUMNS, [_values(row) for row in fresh])
            self._lock(missing)  # another process may have been first
        for row_id, (account, _) in wanted.items():
            row, budget = self.rows[row_id], account.budget
            row.cap_usd, row.cap_tokens = budget.usd, budget.tokens
            row.alerts, row.webhook = ",".join(map(str, budget.alerts)), budget.webhook

    def _lock(self, ids: Iterable[str]) -> None:
        for found in self._statements.locked(_COLUMNS, "ledger_accounts", ids):
            self._loaded[found[0]] = found
            self.rows[found[0]] = AccountRow(*found)

    def write(self) -> None:
        changed = [values for values in map(_values, self.rows.values()) if values != self._loaded[values[0]]]
        self._statements.many(_UPDATE, [(*values[_FIRST_CHANGING:], values[0]) for values in changed])


def _new_row(row_id: str, account: Account, now: float) -> AccountRow:
    window = account.budget.window
    return AccountRow(row_id, account.id, window.start(now), window.end(now))
