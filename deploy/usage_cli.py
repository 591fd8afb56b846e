"""`signalbox usage`: the books of an instance's database. Works whether or not it is running."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.generations_cli import Database, database_url, table
from replicas.protocol import InvalidRequest

if TYPE_CHECKING:
    from gateway.admin_usage import BudgetStanding, Usage


def usage(
    key: Annotated[str | None, typer.Option(help="Of one API key, by its name.")] = None,
    team: Annotated[str | None, typer.Option(help="Of one team: the tenant of its keys.")] = None,
    model: Annotated[str | None, typer.Option(help="Of one model.")] = None,
    since: Annotated[str, typer.Option(help="A day (2026-11-24), a month (2026-11), or days back (7d).")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    database: Database = "",
) -> None:
    """Show what was used and what it cost by day, key, team and model, and how every budget stands.

    Days are UTC. Usage that was not known and is charged as reserved is counted under "estimated";
    tokens that were made and shown to nobody, because a replica died or a caller left, are "unbilled".
    """
    from gateway.admin_usage import checked_since, read_usage
    from gateway.db.database import open_engine, reading
    from gateway.ledger.report import Question

    question = Question(key=key, team=team, model=model, since=checked_since(_day(since)))
    engine = open_engine(database_url(database))
    try:
        with reading(engine).begin() as connection:
            found = read_usage(connection, question, time.time())
    finally:
        engine.dispose()
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _show(found)


def _day(since: str) -> str:
    back = re.fullmatch(r"(\d+)d", since)
    if back is None:
        return since
    try:
        return (datetime.now(UTC) - timedelta(days=int(back[1]))).strftime("%Y-%m-%d")
    except OverflowError:
        raise InvalidRequest(f"since: {since!r} is before all days", param="since") from None


def _show(found: Usage) -> None:
    amounts = ("requests", "prompt", "cached", "generated", "USD", "estimated", "unbilled")
    rows = [[one.period, one.key, one.team, one.model, *_amounts(one)] for one in found.data]
    table(("day", "key", "team", "model", *amounts), [*rows, ["total", "", "", "", *_amounts(found.total)]])
    if found.budgets:
        of = ("budget of", "window", "unit", "cap", "spent", "reserved", "left", "overrun", "ends")
        table(of, [row for one in found.budgets for row in _standing(one)])


def _amounts(used: Any) -> list[str]:
    counts = (used.requests, used.prompt_tokens, used.cached_tokens, used.completion_tokens)
    return [*map(str, counts), _usd(used.cost_usd), str(used.estimated or ""), str(used.unbilled_tokens or "")]


def _usd(amount: float) -> str:
    whole, _, rest = f"{amount:.12f}".rstrip("0").partition(".")
    return f"{whole}.{rest:0<2}"


def _standing(one: BudgetStanding) -> list[list[str]]:
    """A line per unit that is capped."""
    scope = ", ".join(f"{name} {value}" for name in ("key", "team", "model") if (value := getattr(one, name)))
    ends = "never" if one.ends is None else datetime.fromtimestamp(one.ends, UTC).strftime("%Y-%m-%d %H:%M")
    lines = []
    if one.cap_usd is not None:
        left = one.cap_usd - one.spent_usd - one.reserved_usd
        lines.append(["USD", *map(_usd, (one.cap_usd, one.spent_usd, one.reserved_usd, left, one.overrun_usd))])
    if one.cap_tokens is not None:
        rest = one.cap_tokens - one.spent_tokens - one.reserved_tokens
        counts = (one.cap_tokens, one.spent_tokens, one.reserved_tokens, rest, one.overrun_tokens)
        lines.append(["tokens", *map(str, counts)])
    return [[scope, one.window, *line, ends] for line in lines]
