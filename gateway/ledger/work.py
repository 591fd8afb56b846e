"""One transaction's view of the ledger: what it has locked, what it decides, and what it writes at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection

from gateway.ledger.entries import COMPARED, CUT, RESERVED, Ending, LimitReached, Record, Reservation, Reserve, Spend
from gateway.ledger.limits import Gates, gate_id, limit_of
from gateway.ledger.rows import AccountRow, Accounts, account_row_id
from gateway.ledger.sql import Row, Statements
from policies import limits
from policies.budget import Account, Price, usd
from policies.limits import Refusal, Standing
from replicas.protocol import BudgetExceeded, InvalidRequest, SignalboxError, Usage

NOTHING_USED = Usage(prompt_tokens=0, completion_tokens=0)


class RequestRow(NamedTuple):
    """One row of ledger_requests, in the columns' order."""

    id: str
    gateway_id: str
    state: str
    key: str
    team: str
    model: str
    prompt_tokens: int
    max_tokens: int
    price_input: int
    price_cached: int
    price_output: int
    price_request: int
    reserved_usd: int
    reserved_tokens: int
    holds: str
    began_at: float
    ended_at: float | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: int = 0
    overrun_usd: int = 0
    estimated: int = 0
    source: str = ""
    unbilled_tokens: int = 0


REQUEST_COLUMNS = ", ".join(RequestRow._fields)


class Holds(msgspec.Struct, array_like=True, frozen=True):
    """What an open request has reserved in: account rows, and gates as (id, requests, tokens, concurrency)."""

    accounts: tuple[str, ...] = ()
    gates: tuple[tuple[str, int | None, int | None, int | None], ...] = ()


_encode_holds = msgspec.json.Encoder().encode
_decode_holds = msgspec.json.Decoder(Holds).decode


@dataclass(frozen=True, slots=True)
class Alert:
    """`share` basis points of a budget are spent. `row` is the account as the transaction left it."""

    id: str
    share: int
    row: AccountRow


class Work:
    def __init__(self, connection: Connection, gateway_id: str, now: float) -> None:
        self.statements = Statements(connection)
        self._gateway_id = gateway_id
        self._now = now
        self._accounts = Accounts(self.statements)
        self._gates = Gates(self.statements)
        self._opened: dict[str, RequestRow] = {}
        self._closed: list[Row] = []
        self._compared: list[Row] = []
        self._usage: dict[tuple[str, str, str, str], list[int]] = {}
        self._alerts: list[Alert] = []

    # ---------------------------------------------------------------- what it locks

    def renew(self, lease_until: float, links: Iterable[str] = (), unlinked: Iterable[str] = ()) -> None:
        self.statements.run(
            "INSERT INTO ledger_gateways (id, lease_until) VALUES (?, ?)"
            " ON CONFLICT (id) DO UPDATE SET lease_until=excluded.lease_until",
            self._gateway_id,
            lease_until,
        )
        self.statements.many(
            "INSERT INTO ledger_links (gateway_id, incarnation) VALUES (?, ?) ON CONFLICT DO NOTHING",
            [(self._gateway_id, incarnation) for incarnation in sorted(links)],
        )
        self.statements.many(
            "DELETE FROM ledger_links WHERE gateway_id=? AND incarnation=?",
            [(self._gateway_id, incarnation) for incarnation in sorted(unlinked)],
        )

    def open_rows(self, ids: Iterable[str]) -> dict[str, RequestRow]:
        rows = self.statements.locked(REQUEST_COLUMNS, "ledger_requests", ids, "AND state='open'")
        return {row[0]: RequestRow._make(row) for row in rows}

    def open_rows_of(self, gateway_id: str) -> dict[str, RequestRow]:
        rows = self.statements.for_update(
            f"SELECT {REQUEST_COLUMNS} FROM ledger_requests WHERE gateway_id=? AND state='open' ORDER BY id",
            gateway_id,
        )
        return {row[0]: RequestRow._make(row) for row in rows}

    def load(self, closing: Iterable[RequestRow], reserving: Sequence[Reserve]) -> None:
        """Lock every account and gate that these touch."""
        holds = [_decode_holds(row.holds) for row in closing]
        wanted: dict[str, tuple[Account, float]] = {
            account_row_id(account.id, account.budget.window.start(self._now)): (account, self._now)
            for each in reserving
            for account in each.accounts
        }
        self._accounts.load((id for held in holds for id in held.accounts), wanted)
        gates = {gate[0] for held in holds for gate in held.gates}
        self._gates.load(gates | {gate_id(limit) for each in reserving for limit in each.limits})

    # ---------------------------------------------------------------- what it decides

    def reserve(self, wanted: Reserve) -> Reservation | SignalboxError:
        spend = wanted.spend
        if spend.id in self._opened:
            return InvalidRequest(f"request {spend.id!r} has a reservation already")
        rows = [
            self._accounts.rows[account_row_id(account.id, account.budget.window.start(self._now))]
            for account in wanted.accounts
        ]
        for account, row in zip(wanted.accounts, rows, strict=True):
            if not row.has_room(spend.most_usd, spend.most_tokens):
                return self._over_budget(account, row, spend)
        gates = [(limit, self._gates.gates[gate_id(limit)]) for limit in wanted.limits]
        now_us = int(self._now * 1e6)
        refusal = limits.admit(gates, now_us, spend.most_tokens, spend.claimant, fresh=spend.fresh)
        if refusal is not None:
            standings = tuple(limits.standing(limit, gate) for limit, gate in gates)
            return _limited(refusal, spend.most_tokens, standings)
        for row in rows:
            row.reserve(spend.most_usd, spend.most_tokens)
        holds = Holds(
            tuple(row.id for row in rows),
            tuple((gate_id(limit), limit.requests, limit.tokens, limit.concurrency) for limit in wanted.limits),
        )
        self._opened[spend.id] = self._open_row(spend, _encode_holds(holds).decode())
        return Reservation(
            spend=spend,
            began_at=self._now,
            accounts=wanted.accounts,
            limits=wanted.limits,
            used={
                account.id: (row.spent_usd + row.reserved_usd, row.spent_tokens + row.reserved_tokens)
                for account, row in zip(wanted.accounts, rows, strict=True)
            },
            standings=tuple(limits.standing(limit, gate) for limit, gate in gates),
        )

    def close(self, row: RequestRow, ending: Ending) -> None:
        """Settle or release a locked open row."""
        usage = ending.usage or NOTHING_USED
        price = Price(
            input=row.price_input, cached_input=row.price_cached, output=row.price_output, request=row.price_request
        )
        cost = 0 if ending.usage is None else row.reserved_usd if ending.source == RESERVED else price.cost(usage)
        used_tokens = usage.prompt_tokens + usage.completion_tokens
        holds = _decode_holds(row.holds)
        for id in holds.accounts:
            account = self._accounts.rows[id]
            account.close((row.reserved_usd, row.reserved_tokens), (cost, used_tokens))
            for share in account.due_alerts():
                account.alerted = share
                self._alerts.append(Alert(f"{id}#{share}", share, account))
        for id, *most in holds.gates:
            unused = row.reserved_tokens - used_tokens
            limit, gate = limit_of(id, *most), self._gates.gates[id]
            limits.finish(limit, gate, int(self._now * 1e6), unused, ran=ending.usage is not None)
        overrun = max(0, cost - row.reserved_usd)
        prompt_tokens = row.prompt_tokens if ending.usage is None else usage.prompt_tokens
        self._closed.append(
            (
                *(_state(ending), self._now, prompt_tokens, usage.cached_tokens, usage.completion_tokens),
                *(cost, overrun, int(ending.estimated), ending.source, ending.unbilled, row.id),
            )
        )
        self._count((row.key, row.team, row.model), ending, cost)

    def record(self, records: Sequence[Record]) -> set[str]:
        """Note usage that nothing was reserved for; the ids that were not known yet."""
        rows = {record.spend.id: self._settled_row(record) for record in records}
        new = self.statements.inserted("ledger_requests", REQUEST_COLUMNS, list(rows.values()))
        for record in records:
            if record.spend.id in new:
                subject = record.spend.subject
                self._count((subject.key, subject.team, subject.model), record.ending, _cost(record))
        return new

    def compare(self, made: Mapping[str, int]) -> None:
        """Lock those that were cut short; what was made for them, by id, and is not charged is noted as unbilled."""
        for found in self.statements.locked(REQUEST_COLUMNS, "ledger_requests", made, f"AND source='{CUT}'"):
            row = RequestRow._make(found)
            unbilled = max(row.unbilled_tokens, made[row.id] - row.completion_tokens)
            self._compared.append((unbilled, COMPARED, row.id))
            more = Ending(usage=None, unbilled=unbilled - row.unbilled_tokens)
            self._count((row.key, row.team, row.model), more, 0)

    # ---------------------------------------------------------------- what it writes

    def write(self) -> list[Alert]:
        statements = self.statements
        if self._opened:
            new = statements.inserted("ledger_requests", REQUEST_COLUMNS, list(self._opened.values()))
            if len(new) < len(self._opened):
                raise InvalidRequest("a request with this id has a reservation already")
        statements.many(
            "UPDATE ledger_requests SET state=?, ended_at=?, prompt_tokens=?, cached_tokens=?, completion_tokens=?,"
            " cost_usd=?, overrun_usd=?, estimated=?, source=?, unbilled_tokens=?, holds=''"
            " WHERE id=? AND state='open'",
            self._closed,
        )
        statements.many("UPDATE ledger_requests SET unbilled_tokens=?, source=? WHERE id=?", self._compared)
        self._accounts.write()
        self._gates.write()
        statements.many(
            "INSERT INTO ledger_usage (period, key, team, model, requests, estimated, prompt_tokens, cached_tokens,"
            " completion_tokens, cost_usd, unbilled_tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (period, key, team, model) DO UPDATE SET requests=ledger_usage.requests+excluded.requests,"
            " estimated=ledger_usage.estimated+excluded.estimated,"
            " prompt_tokens=ledger_usage.prompt_tokens+excluded.prompt_tokens,"
            " cached_tokens=ledger_usage.cached_tokens+excluded.cached_tokens,"
            " completion_tokens=ledger_usage.completion_tokens+excluded.completion_tokens,"
            " cost_usd=ledger_usage.cost_usd+excluded.cost_usd,"
            " unbilled_tokens=ledger_usage.unbilled_tokens+excluded.unbilled_tokens",
            [(*who, *amounts) for who, amounts in sorted(self._usage.items())],
        )
        statements.many(
            "INSERT INTO ledger_events (id, created_at, payload, webhook, attempts, next_at, delivered_at)"
            " VALUES (?, ?, ?, ?, 0, ?, NULL) ON CONFLICT (id) DO NOTHING",
            [
                (alert.id, self._now, payload(alert, self._now), url, self._now if url else None)
                for alert in self._alerts
                for url in (alert.row.webhook,)
            ],
        )
        return [replace(alert, row=replace(alert.row)) for alert in self._alerts]

    def _count(self, who: tuple[str, str, str], ending: Ending, cost: int) -> None:
        if ending.usage is None and not ending.unbilled:
            return
        day, usage = datetime.fromtimestamp(self._now, UTC).strftime("%Y-%m-%d"), ending.usage or NOTHING_USED
        tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        amounts = (int(ending.usage is not None), int(ending.estimated), *tokens, cost, ending.unbilled)
        total = self._usage.setdefault((day, *who), [0] * len(amounts))
        for position, amount in enumerate(amounts):
            total[position] += amount

    def _open_row(self, spend: Spend, holds: str) -> RequestRow:
        subject, price = spend.subject, spend.price
        return RequestRow(
            id=spend.id,
            gateway_id=self._gateway_id,
            state="open",
            key=subject.key,
            team=subject.team,
            model=subject.model,
            prompt_tokens=spend.prompt_tokens,
            max_tokens=spend.max_tokens,
            price_input=price.input,
            price_cached=price.cached_input,
            price_output=price.output,
            price_request=price.request,
            reserved_usd=spend.most_usd,
            reserved_tokens=spend.most_tokens,
            holds=holds,
            began_at=self._now,
        )

    def _settled_row(self, record: Record) -> RequestRow:
        usage = record.ending.usage or NOTHING_USED
        return self._open_row(record.spend, "")._replace(
            state=_state(record.ending),
            prompt_tokens=usage.prompt_tokens,
            reserved_usd=0,
            reserved_tokens=0,
            began_at=record.began_at,
            ended_at=self._now,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            cost_usd=_cost(record),
            estimated=int(record.ending.estimated),
            source=record.ending.source,
            unbilled_tokens=record.ending.unbilled,
        )

    def _over_budget(self, account: Account, row: AccountRow, spend: Spend) -> BudgetExceeded:
        budget, money = account.budget, not _fits(row.spent_usd + row.reserved_usd, spend.most_usd, row.cap_usd)
        cap, need = (row.cap_usd, spend.most_usd) if money else (row.cap_tokens, spend.most_tokens)
        used = row.spent_usd + row.reserved_usd if money else row.spent_tokens + row.reserved_tokens
        assert cap is not None, "only a cap refuses"
        unit, written = ("USD", usd) if money else ("tokens", int)
        end = budget.window.end(self._now)
        fits_next = end is not None and need <= cap
        return BudgetExceeded(
            f"the budget of {written(cap)} {unit} ({budget.window.value}) for {budget.scope} is exceeded: "
            f"{written(used)} are spent or reserved, and this request may need {written(need)}",
            retry_after_s=end - self._now if end is not None and fits_next else None,
        )


def _state(ending: Ending) -> str:
    return "released" if ending.usage is None else "settled"


def _cost(record: Record) -> int:
    return 0 if record.ending.usage is None else record.spend.price.cost(record.ending.usage)


def _fits(used: int, need: int, cap: int | None) -> bool:
    return cap is None or used + need <= cap


def _limited(refusal: Refusal, tokens: int, standings: tuple[Mapping[str, Standing], ...]) -> LimitReached:
    limit, kind, wait_us = refusal.limit, refusal.kind, refusal.retry_after_us
    if kind == "concurrency":
        most = f"{limit.concurrency} requests at once"
    elif kind == "tokens":
        most = f"{limit.tokens} tokens per minute (this request may need {tokens})"
    else:
        most = f"{limit.requests} requests per minute"
    return LimitReached(
        f"rate limit reached for {limit.scope}: {most}",
        retry_after_s=None if wait_us is None else wait_us / 1e6,
        standings=standings,
    )


def payload(alert: Alert, now: float) -> str:
    """What a webhook is told: amounts in dollars as decimal text."""
    row = alert.row
    return msgspec.json.encode(
        {
            "id": alert.id,
            "type": "budget.alert",
            "created_at": now,
            "account": msgspec.json.decode(row.account),
            "window_starts": row.starts,
            "window_ends": row.ends,
            "share": alert.share / 10_000,
            "spent_usd": str(usd(row.spent_usd)),
            "budget_usd": None if row.cap_usd is None else str(usd(row.cap_usd)),
            "spent_tokens": row.spent_tokens,
            "budget_tokens": row.cap_tokens,
        }
    ).decode()
