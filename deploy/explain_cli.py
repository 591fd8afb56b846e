"""`signalbox explain ID`: why a request went where it went, from whichever gateway it passed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from deploy.generations_cli import Database, database_url


def explain(
    request_id: Annotated[str, typer.Argument(help="The x-request-id that came with the answer.")],
    database: Database = "",
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show the generation, the candidates with every score term, predictions and what came of them.

    Gateways remember the last hour, as far as it fits into memory.
    """
    from gateway.admin_requests import newest_first
    from gateway.db.database import open_engine
    from gateway.explain import EXPLAIN
    from gateway.mailbox import ask_all
    from replicas.protocol import Unavailable

    engine = open_engine(database_url(database))
    try:
        answers = ask_all(engine, EXPLAIN, request_id)
    finally:
        engine.dispose()
    if not answers:
        raise Unavailable("no gateway is running on this database")
    records = newest_first(answers, request_id)
    if as_json:
        typer.echo(json.dumps(records, indent=2))
    else:
        for record in records:
            _show(record)


def _show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    state = record["status"] or "running"
    console.print(
        f"[bold]{escape(record['request_id'])}[/bold]  {record['endpoint']}  status {state}  "
        f"generation {record['generation']}  key {escape(record['key']['name'])}  gateway {record['gateway']}"
    )
    if record["error"]:
        console.print(f"  error: {escape(record['error'])}")
    limits = [f"priority {record['priority']}"] if record["priority"] else []
    if record["time_limit_s"] is not None:
        limits.append(f"time limit {record['time_limit_s']:.3f} s")
    if limits:
        console.print(f"  {', '.join(limits)}")
    if record["session"]:
        console.print(f"  conversation {record['session']}")
    _show_choice(console, record)
    for step in record["steps"]:
        _show_step(console, step)
    console.print(f"  cost {record['cost_usd']:.9f} USD")


def _show_choice(console: Any, record: dict[str, Any]) -> None:
    from rich.table import Table

    choice = record["model_choice"]
    if choice is None or "chosen" not in choice:
        console.print(f"  model {record['model_asked']!r} asked for")
        return
    console.print(f"  model {record['model_asked']!r} -> {choice['chosen']!r}: {choice['reason']}")
    table = Table("model", "predicted quality", "expected USD", "utility", title="models", title_justify="left")
    for one in choice["candidates"]:
        utility = "" if one["utility"] is None else f"{one['utility']:.4f}"
        table.add_row(one["model"], f"{one['predicted_quality']:.4f}", f"{one['expected_cost_usd']:.9f}", utility)
    console.print(table)
    if choice["skipped"]:
        console.print(f"  not considered: {', '.join(choice['skipped'])}")


def _show_step(console: Any, step: dict[str, Any]) -> None:
    from rich.table import Table

    facts = [f"{step['role']}: {step['model']}", _milliseconds("predicted TTFT", step["predicted_ttft_ms"])]
    facts.append(_milliseconds("actual TTFT", step["ttft_ms"]))
    if usage := step["usage"]:
        facts.append(
            f"{usage['prompt_tokens']} prompt tokens ({usage['cached_tokens']} cached), "
            f"{usage['completion_tokens']} generated"
        )
    for name in ("expected_output_tokens", "mean_logprob", "escalated", "agreement", "error"):
        if step[name] is not None:
            facts.append(f"{name.replace('_', ' ')} {step[name]}")
    console.print("  " + "; ".join(fact for fact in facts if fact))
    for attempt in step["attempts"]:
        names = [name for name in attempt["candidates"][0] if name != "replica"] if attempt["candidates"] else []
        table = Table("replica", *names, title=f"replicas, by {attempt['policy']}", title_justify="left")
        for one in attempt["candidates"]:
            mark = " <-" if one["replica"] == attempt["replica"] else ""
            table.add_row(one["replica"] + mark, *(f"{one[name]:.2f}" for name in names))
        console.print(table)
        if attempt["error"]:
            console.print(f"  failed: {attempt['error']}")
    _show_ledger(console, step["ledger"])


def _show_ledger(console: Any, attempts: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(
        "attempt", "reserved USD", "tokens", "ended", "by", "prompt", "cached", "generated", "USD", title="ledger"
    )
    for one in attempts:
        reserved = (f"{one['reserved_usd']:.9f}", str(one["reserved_tokens"])) if one["reserved_tokens"] else ("-", "-")
        by = f"{one['source'] or '-'}{' (estimated)' if one['estimated'] else ''}"
        counts = (str(one[f"{kind}_tokens"]) for kind in ("prompt", "cached", "completion"))
        table.add_row(one["id"], *reserved, one["state"], by, *counts, f"{one['cost_usd']:.9f}")
    if attempts:
        console.print(table)


def _milliseconds(what: str, value: float | None) -> str:
    return "" if value is None else f"{what} {value:.1f} ms"
