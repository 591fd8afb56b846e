"""The books for people: totals per day, key, team and model, and how every budget stands. Blocking, reads only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from gateway.ledger.usage import Standing, Total, request, standings, totals
from gateway.ledger.work import RequestRow
from policies.budget import EACH, Budget, Budgets, usd


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """None asks for all. since: the first day or month, "2026-11-24" or "2026-11"."""

    key: str | None = None
    team: str | None = None
    model: str | None = None
    since: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    totals: tuple[Total, ...]
    budgets: tuple[Standing, ...]


def report(connection: Connection, question: Question, budgets: Budgets, now: float) -> Report:
    """`budgets`: of the active generation. Those that nothing was charged to yet in their window are at zero; what is
    shown of a cap is what the generation says, not what the last reservation found.
    """
    asked = (question.key, question.team, question.model)
    rows = [
        total
        for total in totals(connection, since=question.since)
        if all(wanted in (None, is_) for wanted, is_ in zip(asked, (total.key, total.team, total.model), strict=True))
    ]
    found = {_name(one): one for one in standings(connection, now)}
    for budget in _named(budgets):
        fresh = _untouched(budget, now)
        known = found.get(_name(fresh))
        found[_name(fresh)] = replace(known, cap_usd=budget.usd, cap_tokens=budget.tokens) if known else fresh
    shown = [
        one
        for one in found.values()
        if all(wanted is None or of in (None, wanted) for wanted, of in zip(asked, _scope(one), strict=True))
    ]
    return Report(tuple(rows), tuple(sorted(shown, key=lambda one: tuple(map(str, _name(one))))))


def attempts(connection: Connection, answer_ids: Iterable[str]) -> list[dict[str, object]]:
    """Reservation and settlement of every attempt at these answers, as JSON."""
    return [_attempt(row) for id in answer_ids for row in request(connection, id)]


def _attempt(row: RequestRow) -> dict[str, object]:
    return {
        "id": row.id,
        "gateway": row.gateway_id,
        "model": row.model,
        "state": row.state,
        "source": row.source or None,
        "estimated": bool(row.estimated),
        "reserved_usd": float(usd(row.reserved_usd)),
        "reserved_tokens": row.reserved_tokens,
        "cost_usd": float(usd(row.cost_usd)),
        "overrun_usd": float(usd(row.overrun_usd)),
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "unbilled_tokens": row.unbilled_tokens,
        "began_at": row.began_at,
        "ended_at": row.ended_at,
    }


def _scope(one: Standing) -> tuple[str | None, str | None, str | None]:
    return one.key, one.team, one.model


def _name(one: Standing) -> tuple[str | None, ...]:
    return one.window, *_scope(one)


def _named(budgets: Budgets) -> list[Budget]:
    """Those that are one account each, merged where two are over the same; "*" has as many as there are names."""
    found: dict[tuple[object, ...], Budget] = {}
    for budget in budgets.budgets:
        scope = budget.scope
        if EACH not in (scope.key, scope.team, scope.model):
            name = (scope, budget.window)
            found[name] = found[name].merged(budget) if name in found else budget
    return list(found.values())


def _untouched(budget: Budget, now: float) -> Standing:
    scope, window = budget.scope, budget.window
    return Standing(
        window=window.value,
        key=scope.key,
        team=scope.team,
        model=scope.model,
        starts=window.start(now),
        ends=window.end(now),
        spent_usd=0,
        reserved_usd=0,
        cap_usd=budget.usd,
        spent_tokens=0,
        reserved_tokens=0,
        cap_tokens=budget.tokens,
        overrun_usd=0,
        overrun_tokens=0,
    )
