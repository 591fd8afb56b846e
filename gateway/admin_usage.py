"""GET /admin/v1/usage: what was used and what it cost, by day, key, team and model; how every budget stands."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Security
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from gateway import generations
from gateway.admin import Admin
from gateway.edge import header
from gateway.ledger.report import Question, Report, report
from gateway.ledger.usage import Standing, Total
from gateway.schemas import ADMIN, ErrorResponse
from policies import budget
from policies.budget import usd
from policies.document import parse
from replicas.protocol import InvalidRequest

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A parameter is wrong."},
    401: {"model": ErrorResponse, "description": "No admin token, or a wrong or revoked one."},
}


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Used(_Closed):
    """requests: attempts that were charged. estimated: those of them whose usage was not known and was assumed.
    unbilled_tokens: made for attempts that failed or were cut short, shown to nobody and charged to nobody.
    """

    requests: int
    estimated: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_usd: float
    unbilled_tokens: int


class UsedBy(Used):
    """period: a day, "2026-11-24" (UTC), or for days long past a month."""

    period: str
    key: str
    team: str
    model: str


class BudgetStanding(_Closed):
    """A budget in its present window; what has no cap is null there. overrun: spent beyond what had been reserved."""

    window: str
    key: str | None
    team: str | None
    model: str | None
    starts: int
    ends: int | None
    cap_usd: float | None
    spent_usd: float
    reserved_usd: float
    overrun_usd: float
    cap_tokens: int | None
    spent_tokens: int
    reserved_tokens: int
    overrun_tokens: int


class Usage(_Closed):
    total: Used
    data: list[UsedBy]
    budgets: list[BudgetStanding]


def read_usage(connection: Connection, question: Question, now: float) -> Usage:
    """Of one database, under its active generation. Blocking."""
    active = generations.latest(connection).active
    document = parse(generations.stored(connection, (active,))[active].document)
    return _shown(report(connection, question, budget.from_document(document.budgets), now))


def create_router(admin: Callable[[], Admin]) -> APIRouter:
    router = APIRouter(prefix="/admin/v1/usage", tags=["usage"], responses=_REFUSALS, dependencies=[Security(ADMIN)])

    @router.get("")
    async def usage(
        request: Request,
        key: str | None = None,
        team: str | None = None,
        model: str | None = None,
        since: Annotated[str, Query(description="The first day or month: 2026-11-24 or 2026-11.")] = "",
    ) -> Usage:
        """Totals since a day, and budgets in their present windows; of one key, team or model where given."""
        await admin().tokens.authenticate(header(request.scope, b"authorization"))
        question = Question(key=key, team=team, model=model, since=checked_since(since))
        return await admin().run(
            lambda register: register.read(lambda connection: read_usage(connection, question, time.time()))
        )

    return router


def checked_since(text: str) -> str:
    """ "", or a day or month that exists; InvalidRequest."""
    for form in ("%Y-%m-%d", "%Y-%m"):
        try:
            return datetime.strptime(text, form).strftime(form)
        except ValueError:
            continue
    if text:
        raise InvalidRequest(f"since: {text!r} is not a day (2026-11-24) or a month (2026-11)", param="since")
    return ""


def _shown(found: Report) -> Usage:
    data = [_used_by(total) for total in found.totals]
    sums = [sum(int(getattr(total, name)) for total in found.totals) for name in Total._fields[4:]]
    return Usage(
        total=Used(**_amounts(Total("", "", "", "", *sums))),
        data=data,
        budgets=[_budget(one) for one in found.budgets],
    )


def _amounts(total: Total) -> dict[str, Any]:
    return {**{name: getattr(total, name) for name in Total._fields[4:]}, "cost_usd": float(usd(total.cost_usd))}


def _used_by(total: Total) -> UsedBy:
    return UsedBy(period=total.period, key=total.key, team=total.team, model=total.model, **_amounts(total))


def _budget(one: Standing) -> BudgetStanding:
    return BudgetStanding(
        window=one.window,
        key=one.key,
        team=one.team,
        model=one.model,
        starts=one.starts,
        ends=one.ends,
        cap_usd=None if one.cap_usd is None else float(usd(one.cap_usd)),
        spent_usd=float(usd(one.spent_usd)),
        reserved_usd=float(usd(one.reserved_usd)),
        overrun_usd=float(usd(one.overrun_usd)),
        cap_tokens=one.cap_tokens,
        spent_tokens=one.spent_tokens,
        reserved_tokens=one.reserved_tokens,
        overrun_tokens=one.overrun_tokens,
    )
