"""What a terminal shows: live progress while a run goes on, and its figures when it is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from load.execute import Collected, Progress, planned_end
from load.http1 import clock
from load.plan import Plan
from load.record import REJECTED
from load.stats import Estimate
from load.units import show_time

Json = dict[str, Any]
NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "chunk_gap": "chunk gap",
    "e2e": "E2E",
    "queue": "server's queue",
}
_RECENT = 200
_FLAWS = {
    "no_usage": "answers without usage: tokens are counted as events",
    "more_events_than_tokens": "answers with more events than tokens in usage",
    "more_tokens_than_asked": "answers with more tokens than max_tokens",
    "length_but_not_as_asked": "answers that ended by length with another count than max_tokens",
    "prompt_smaller_than_put_in": "prompts counted smaller than the words put in",
    "more_cached_than_prompt": "answers with more cached tokens than prompt tokens",
    "not_as_tokenizer_counts": "answers whose usage is not what the tokenizer counts",
}


@contextmanager
def progress(console: Console, plan: Plan, label: str) -> Iterator[Progress]:
    """A live display on a terminal; a line every 10 s where there is none."""
    end = planned_end(plan)
    if not console.is_terminal:
        yield _lines(console, label)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def update(collected: Collected, now: float) -> None:
            live.update(_panel(collected, now - collected.start, end, label))

        yield update


def _lines(console: Console, label: str) -> Progress:
    last = clock()

    def update(collected: Collected, now: float) -> None:
        nonlocal last
        if now - last >= 10:
            last = now
            console.print(_state(collected, now - collected.start, label), highlight=False)

    return update


def _state(collected: Collected, elapsed: float, label: str) -> str:
    recent = collected.records[-_RECENT:]
    ends = [record.end - record.scheduled for record in recent if not record.error]
    firsts = [record.first - record.scheduled for record in recent if record.chunks]
    failed = sum(record.error not in ("", REJECTED) for record in collected.records)
    rejected = sum(record.error == REJECTED for record in collected.records)
    parts = [f"{label}: {max(elapsed, 0):.0f} s, {len(collected.records)} answered"]
    if firsts:
        parts.append(f"TTFT p50 {show_time(float(np.median(firsts)))}")
    if ends:
        parts.append(f"E2E p50 {show_time(float(np.median(ends)))}, p95 {show_time(float(np.percentile(ends, 95)))}")
    lags = [record.begun - record.scheduled for record in recent]
    if lags:
        parts.append(f"send lag p99 {show_time(float(np.percentile(lags, 99)))}")
    parts += [f"{rejected} rejected"] * bool(rejected) + [f"{failed} failed"] * bool(failed)
    return " · ".join(parts)


def _panel(collected: Collected, elapsed: float, end: float | None, label: str) -> Group:
    bar = ProgressBar(total=end, completed=min(max(elapsed, 0.0), end) if end else 0, pulse=end is None, width=60)
    return Group(bar, Text(_state(collected, elapsed, label)))


def spread(estimate: Json | None, scale: str = "time") -> str:
    """`120 ms (115 ms-131 ms)`: the figure and its 95 % interval."""
    if estimate is None or estimate["value"] is None:
        return "-"
    form = show_time if scale == "time" else _number if scale == "number" else _percent
    if estimate["low"] is None or estimate["high"] is None:
        return form(estimate["value"])
    return f"{form(estimate['value'])} ({form(estimate['low'])} - {form(estimate['high'])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.2%}" if 0 < value < 0.1 else f"{value:.1%}"


def show_run(console: Console, run: Json) -> None:
    console.print(_latencies(run))
    rates, tokens = run["rates"], run["tokens"]
    offered = rates["offered_requests_per_s"]
    lines = [
        f"throughput      {spread(rates['requests_per_s'], 'number')} requests/s"
        + (f" of {_number(offered)} offered" if offered else ""),
        f"tokens          {spread(rates['output_tokens_per_s'], 'number')} output/s, "
        f"{spread(rates['input_tokens_per_s'], 'number')} input/s"
        + (f", {tokens['tokens_per_event']:.3g} per event" if tokens["tokens_per_event"] else ""),
    ]
    if tokens["cached_share"] is not None:
        lines.append(f"prefix cache    {tokens['cached_share']:.1%} of prompt tokens")
    if run["cost"]:
        cost = run["cost"]
        each = cost["usd_per_million_output_tokens"]
        lines.append(
            f"cost            ${cost['usd']:.4g}, ${cost['usd_per_request']:.3g} a request"
            + (f", ${each:.3g} per million output tokens" if each else "")
        )
    lines.append(_counts(run["counts"]["all"]))
    lag = run["generator"]["lag"]
    lines.append(
        f"send lag        p50 {show_time(lag['p50'])}, p99 {show_time(lag['p99'])}, max {show_time(lag['max'])}; "
        f"workers' cores busy {max(run['generator']['busy'], default=0):.0%} at most"
    )
    window = run["window"]
    lines.append(f"warm-up         {window['warmup']['cut']} requests left out ({window['warmup']['rule']})")
    console.print("\n".join(lines), highlight=False)
    _show_slo(console, run["slo"])
    for warning in warnings(run):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)


def _latencies(run: Json) -> Grid:
    grid = Grid("", title=run["label"], title_justify="left")
    for name in ("mean", "p50 (95 % interval)", "p90", "p95", "p99", "max"):
        grid.add_column(name, justify="right")
    for metric, name in NAMES.items():
        found = run["latency"][metric]
        if found is not None:
            grid.add_row(
                name,
                show_time(found["mean"]["value"]),
                *(spread(found[rank]) for rank in ("p50",)),
                show_time(found["p90"]["value"]),
                *(spread(found[rank]) for rank in ("p95", "p99")),
                show_time(found["max"]),
            )
    return grid


def _counts(found: Json) -> str:
    parts = [f"{found['completed']} of {found['sent']} completed"]
    names = ("rejected", "unreachable", "status", "server_error", "garbage", "cut", "timeout", "unfinished")
    parts += [f"{found[name]} {name.replace('_', ' ')}" for name in names if found[name]]
    statuses = ", ".join(f"{status}: {number}" for status, number in found["statuses"].items())
    return f"requests        {', '.join(parts)} (status {statuses or 'none'})"


def _show_slo(console: Console, slo: Json | None) -> None:
    if slo is None:
        return
    for one in slo["objectives"]:
        scale = "percent" if one["name"] == "error_rate" else "time"
        bound = _percent(one["bound"]) if scale == "percent" else show_time(one["bound"])
        verdict = "[green]met[/]   " if one["met"] else "[red]MISSED[/]"
        console.print(f"{verdict}          {one['name']} <= {bound}: {spread(one['value'], scale)}", highlight=False)
    console.print(
        f"goodput         {spread(slo['goodput_requests_per_s'], 'number')} requests/s meet every objective; "
        f"attainment {spread(slo['attainment'], 'percent')}, reject rate {spread(slo['reject_rate'], 'percent')}",
        highlight=False,
    )


def warnings(run: Json) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if not run["generator"]["kept_up"]:
        found.append(
            "THE GENERATOR COULD NOT KEEP UP: these figures say more of it than of the server. Rule: "
            f"{run['generator']['rule']}; here {show_time(run['generator']['lag']['p99'])} against "
            f"{show_time(run['generator']['limit_s'])}, and {run['generator']['stalled_share']:.1%} standing still "
            f"(longest {show_time(run['generator']['longest_stall_s'])}). Use more --workers, or another machine."
        )
    if not run["window"]["warmup"]["settled"]:
        found.append("no steady state was found (MSER-5 wants to cut more than half): nothing is cut; run longer")
    if run["stopped"]:
        found.append(f"the run ended early: {run['stopped']}")
    done = run["counts"]["all"]["completed"]
    for name, count in run["checks"].items():
        if count:
            found.append(f"{count} of {done} {_FLAWS[name]}")
    found += [f"{one['count']} x {one['kind']}: {one['detail']}" for one in run["failures"][:5]]
    tail = run["latency"]["e2e"]
    if tail and tail["count"] < 100:
        found.append(f"{tail['count']} measured requests bound no p99")
    return found


def estimate(found: Json | None) -> Estimate:
    return Estimate(float("nan")) if found is None else Estimate.from_json(found)
