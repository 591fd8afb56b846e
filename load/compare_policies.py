"""Replica choice, for real: every policy on the same traffic, one after the other, on a running instance.

    signalbox policy simulate --trace FILE --replicas 4 ... --json simulated.json
    python -m load.compare_policies --trace FILE --base-url URL --admin-token-env NAME --simulated simulated.json

Publishes `affinity: {policy: NAME}` through the admin API, replays the trace's first requests in an open loop at a
share of the rate at which round_robin saturates, and goes on to the next policy; afterwards the generation that it
found serves again. The saturation rate is the simulator's (or give --rate). No run finds anything of another in the
caches (load.live_trace). TTFT counts from the scheduled send time; the hit rate is the replicas' own: cached over
prompt tokens of usage. A run during which the generator itself stood still is no measurement and is made once more.

Exit status: 0 done · 1 requests failed, or with --check the order is not the simulator's · 2 cannot begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from load.execute import Collected, execute
from load.http1 import Origin, parse_url
from load.live_client import Admin, Client, Published, credential, publish
from load.live_order import OURS, Figures, Verdict, judge, mean
from load.live_trace import SaltedTrace, segment
from load.plan import Plan, Replayed, Target
from load.stats import percentile
from load.table import table_of
from load.units import BadOption, LoadError
from policies.traces import TraceError, TraceRequest, read_trace, scaled

POLICIES = ("round_robin", "least_load", "power_of_two", "cache_aware", "affinity")
_SETTLE_S = 5.0  # of a policy's share of the time: publish it, start a worker, let the last requests end
_STALL_S = 1.0  # a generator that stood still for longer has not offered the load it says


@dataclass(frozen=True, slots=True)
class Simulated:
    """What `signalbox policy simulate --json` wrote, of one load. runs: figures, one for each file, that is seed."""

    saturation_rate: float
    requests: int
    replicas: int
    load: float
    runs: tuple[tuple[Figures, ...], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One policy's run. Seconds; rates a second. ttft_p95_low, _high: 95 % interval, NaN where it is not bounded.

    computed_tokens_per_s: prompt tokens that no cache saved. lag: of the generator itself, begun - scheduled; stall_s:
    the longest time in which it could neither send nor look at the clock.
    """

    policy: str
    generation: int
    requests: int
    errors: int
    first_error: str
    rate: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p95_low: float
    ttft_p95_high: float
    ttft_p99_s: float
    hit_rate: float
    computed_tokens_per_s: float
    lag_p99_s: float
    lag_max_s: float
    stall_s: float


def read_simulated(paths: Sequence[Path], load: float) -> Simulated:
    """The rows of that load in all files, which must be of the same fleet and trace. Raises BadOption."""
    read = [_read_one(path, load) for path in paths]
    first = read[0]
    for path, one in zip(paths, read, strict=True):
        if (one.requests, one.replicas) != (first.requests, first.replicas):
            raise BadOption(f"--simulated {path} simulates another fleet or trace than {paths[0]}")
    return replace(first, runs=tuple(run for one in read for run in one.runs))


def _read_one(path: Path, load: float) -> Simulated:
    try:
        found = json.loads(path.read_text())
        rows = [row for row in found["rows"] if abs(row["load"] - load) < 1e-9]
        figures = tuple(Figures(row["policy"], float(row["ttft_p95_s"]), float(row["hit_rate"])) for row in rows)
        rate, requests, replicas = float(found["saturation_rate"]), int(found["requests"]), int(found["replicas"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadOption(f"--simulated {path} is not what `signalbox policy simulate --json` writes: {error}") from None
    if not figures:
        raise BadOption(f"--simulated {path} has no rows at a load of {load:g}: simulate with --load {load:g}")
    return Simulated(rate, requests, replicas, load, (figures,))


# ------------------------------------------------------------------------------------------------------------ one run


def measure(published: Published, policy: str, collected: Collected) -> Row:
    """The figures of a run. LoadError where the server does not tell what it cached."""
    table = table_of(collected.records, collected.start)
    good = table.rows(table.ok)
    if len(good) == 0:
        first = collected.records[0].detail if collected.records else collected.stopped
        raise LoadError(f"no request of {policy} was answered; the first: {first}")
    if (good.cached_tokens < 0).any() or (good.prompt_tokens < 1).any():
        raise LoadError("the server's usage has no prompt_tokens_details.cached_tokens: no hit rate to compare")
    # an answer whose only token is half a character has no text; its end is what its caller waited for
    ttft = np.where(np.isnan(good.first), good.column("e2e"), good.column("ttft"))
    lag = table.column("lag")
    p95 = percentile(ttft, 95)
    prompt, cached = int(good.prompt_tokens.sum()), int(good.cached_tokens.sum())
    span = float(np.nanmax(good.end) - table.scheduled[0])
    failed = [record for record in collected.records if record.error]
    return Row(
        policy=policy,
        generation=published.generation,
        requests=len(table),
        errors=len(failed),
        first_error=f"{failed[0].error}: {failed[0].detail}" if failed else "",
        rate=(len(table) - 1) / float(table.scheduled[-1] - table.scheduled[0]),
        ttft_p50_s=percentile(ttft, 50).value,
        ttft_p95_s=p95.value,
        ttft_p95_low=p95.low,
        ttft_p95_high=p95.high,
        ttft_p99_s=percentile(ttft, 99).value,
        hit_rate=cached / prompt,
        computed_tokens_per_s=(prompt - cached) / span,
        lag_p99_s=percentile(lag, 99).value,
        lag_max_s=float(lag.max()),
        stall_s=max((end.longest for end in collected.ends), default=0.0),
    )


def run_policy(target: Target, admin_token: str, policy: str, requests: Sequence[TraceRequest], salt: str) -> Row:
    document = f"affinity: {{policy: {policy}}}\n"
    published = asyncio.run(publish(target.origin, admin_token, document, "load.compare_policies"))
    plan = Plan(
        target=target,
        workload=SaltedTrace(tuple(requests), f"{salt} {policy}"),
        arrivals=Replayed(tuple(one.arrival_s for one in requests)),
        timeout_s=60.0,
        drain_s=60.0,
        scrape=False,
    )
    collected = execute(plan)
    if collected.interrupted:
        raise KeyboardInterrupt
    return measure(published, policy, collected)


async def _active(origin: Origin, token: str) -> int:
    async with Client(origin, token) as client:
        return (await Admin(client).newest())[0]


async def _restore(origin: Origin, token: str, generation: int) -> None:
    async with Client(origin, token) as client:
        await Admin(client).rollback("load.compare_policies is over", to=generation)


# ------------------------------------------------------------------------------------------------------------- report


def show(rows: Sequence[Row], simulated: Simulated | None, verdict: Verdict, console: Console) -> None:
    columns = ("TTFT p50 s", "p95 s", "p99 s", "hit rate", "computed tokens/s")
    table = Table("policy", "requests", "errors", *columns, "client lag p99 ms", title="live")
    for row in rows:
        figures = (f"{value:.3f}" for value in (row.ttft_p50_s, row.ttft_p95_s, row.ttft_p99_s))
        counts = (str(row.requests), str(row.errors), *figures, f"{row.hit_rate:.4f}")
        style = "bold" if row.policy == OURS else None
        table.add_row(
            row.policy, *counts, f"{row.computed_tokens_per_s:.0f}", f"{row.lag_p99_s * 1e3:.1f}", style=style
        )
    console.print(table)
    for row in rows:
        if row.errors:
            console.print(f"{row.policy}: {row.errors} failed, the first: {row.first_error}", markup=False)
    if simulated is not None:
        seeds = f", mean of {len(simulated.runs)} seeds" if len(simulated.runs) > 1 else ""
        table = Table("policy", "TTFT p95 s", "hit rate", title=f"simulated, {simulated.requests} requests{seeds}")
        for one in mean(simulated.runs):
            table.add_row(one.policy, f"{one.ttft_p95_s:.3f}", f"{one.hit_rate:.4f}")
        console.print(table)
    _show_verdict(verdict, console)


def _show_verdict(verdict: Verdict, console: Console) -> None:
    for ranking in verdict.rankings:
        console.print(f"{ranking.figure}, best first")
        console.print(f"  live       {' < '.join(ranking.live)}")
        console.print(f"  simulated  {' < '.join(ranking.simulated)}")
        same = ranking.compared - len(ranking.contradicted)
        console.print(f"  {same} of the {ranking.compared} pairs that the simulator tells apart stand alike")
        for better, worse in ranking.contradicted:
            console.print(f"  the other way round: {better}, {worse}")
    for claim in verdict.claims:
        where = "live" if claim.simulated is None else "live and simulated"
        holds = claim.live and claim.simulated is not False
        missing = "live" if not claim.live else "in the simulation"
        console.print(f"{claim.what}: {f'yes, {where}' if holds else f'NO, not {missing}'}")
    if verdict.rankings:
        console.print(f"the order {'agrees' if verdict.agrees else 'does NOT agree'} with the simulator's")


def as_json(rows: Sequence[Row], simulated: Simulated | None, verdict: Verdict, load: float | None) -> dict[str, Any]:
    return {
        "load": load,
        "live": [asdict(row) for row in rows],
        "simulated": asdict(simulated) if simulated else None,
        "rankings": [asdict(ranking) for ranking in verdict.rankings],
        "claims": [asdict(claim) for claim in verdict.claims],
        "agrees": verdict.agrees,
    }


# ------------------------------------------------------------------------------------------------------------ command


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load.compare_policies", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake .jsonl")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key-env", default="SIGNALBOX_API_KEY", metavar="NAME")
    parser.add_argument("--admin-token-env", default="SIGNALBOX_ADMIN_TOKEN", metavar="NAME")
    parser.add_argument("--model", default="large", help="whose replicas are compared (default: large)")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all policies together (default 5)")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="repeatable; all of them by default")
    parser.add_argument(
        "--simulated",
        type=Path,
        metavar="FILE",
        action="append",
        help="from `signalbox policy simulate --json FILE`; repeatable, one for each --seed",
    )
    parser.add_argument("--load", type=float, default=0.8, help="share of round_robin's saturation rate (default 0.8)")
    parser.add_argument("--rate", type=float, help="requests a second, instead of a share of the simulator's")
    parser.add_argument("--length-scale", type=int, default=32, help="divide the trace's lengths by this (default 32)")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the order is the simulator's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args(arguments)


def plan_of(chosen: argparse.Namespace) -> tuple[list[TraceRequest], Simulated | None]:
    """What every policy is asked, and what the simulator says of it. Raises BadOption."""
    simulated = read_simulated(chosen.simulated, chosen.load) if chosen.simulated else None
    rate = chosen.rate or (simulated.saturation_rate * chosen.load if simulated else 0.0)
    if not rate > 0:
        raise BadOption("say how fast: --simulated FILE, or --rate")
    policies = chosen.policy or POLICIES
    sending_s = chosen.minutes * 60 / len(policies) - _SETTLE_S
    count = int(rate * sending_s)
    if simulated:
        count = min(count, simulated.requests)
    if count < 100:
        raise BadOption(f"{chosen.minutes:g} minutes leave {max(count, 0)} requests to each policy: no p95 to speak of")
    try:
        trace = scaled(read_trace(chosen.trace, count), length_scale=chosen.length_scale)
    except (TraceError, OSError) as error:
        raise BadOption(f"--trace: {error}") from None
    return segment(trace, rate, count), simulated


def compare(chosen: argparse.Namespace, console: Console) -> tuple[list[Row], Simulated | None]:
    key = credential(chosen.api_key_env, "API key")
    token = credential(chosen.admin_token_env, "admin token")
    requests, simulated = plan_of(chosen)
    target = Target(parse_url(chosen.base_url), chosen.model, endpoint="completions", api_key=key)
    if simulated and simulated.requests != len(requests):
        console.print(f"simulated with {simulated.requests} requests; the time is enough for {len(requests)}")
    salt = secrets.token_hex(8)
    before = asyncio.run(_active(target.origin, token))
    rows = []
    try:
        for policy in dict.fromkeys(chosen.policy or POLICIES):
            last = requests[-1].arrival_s
            console.print(f"{policy}: {len(requests)} requests in {last:.0f} s, {len(requests) / last:.1f} a second")
            row = run_policy(target, token, policy, requests, salt)
            if row.stall_s > _STALL_S:
                console.print(f"  the generator stood still for {row.stall_s:.1f} s: once more")
                row = run_policy(target, token, policy, requests, f"{salt} again")
            rows.append(row)
    finally:
        asyncio.run(_restore(target.origin, token, before))
    return rows, simulated


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    try:
        rows, simulated = compare(chosen, console)
    except LoadError as error:
        print(f"compare_policies: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    live = [Figures(row.policy, row.ttft_p95_s, row.hit_rate) for row in rows]
    verdict = judge(live, *(simulated.runs if simulated else ()))
    show(rows, simulated, verdict, console)
    if chosen.json:
        load = chosen.load if simulated and not chosen.rate else None
        chosen.json.write_text(json.dumps(as_json(rows, simulated, verdict, load), indent=2) + "\n")
    failed = any(row.errors for row in rows)
    return 1 if failed or (chosen.check and not verdict.agrees) else 0


if __name__ == "__main__":
    sys.exit(main())
