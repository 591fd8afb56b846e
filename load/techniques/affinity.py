"""Prefix affinity against round robin on a live fleet.

Gateway, sockets, routing and block caches are real, arithmetic is not: fake engines keep a time-table, so that two
cores carry four replicas.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from load.execute import execute
from load.http1 import parse_url
from load.instance import Instance
from load.live_client import publish
from load.live_trace import SaltedTrace
from load.plan import ClosedLoop, Plan, Target
from load.summary import Judging, summarise
from load.units import BadOption, LoadError
from policies.traces import TraceError, TraceRequest, read_trace, scaled

Json = dict[str, Any]

LENGTH_SCALE, CALLERS = 32, 48
FLEET = """\
models:
  - name: model
    engine: fake
    num_cpus: 0.1
    replicas: {min: 4, max: 4}
    engine_settings: {prefill_tokens_per_s: 6000, tokens_per_s: 100, num_blocks: 4000}
gateway: {num_cpus: 0.25}
"""
SIDES = {"off": "round_robin", "on": "affinity"}


def traffic(trace: Path | None, number: int) -> tuple[list[TraceRequest], str]:
    """That many requests, and where they are from. Raises BadOption."""
    if trace is None:
        return _sessions(number), "chat sessions of 6 turns, 30 system prompts of 160 tokens"
    try:
        return scaled(read_trace(trace, number), length_scale=LENGTH_SCALE), f"{trace.name}, lengths / {LENGTH_SCALE}"
    except (TraceError, OSError) as error:
        raise BadOption(f"--mooncake: {error}") from None


def _sessions(number: int, block: int = 16) -> list[TraceRequest]:
    """Sessions that take turns: each request repeats its session's blocks and adds 80 tokens."""
    rng = random.Random(0)
    open_sessions: list[list[int]] = []
    found = []
    for index in range(number):
        while len(open_sessions) < max(number // 25, 4):
            group = rng.randrange(30)
            open_sessions.append([group * 10 + part for part in range(10)])
        session = rng.choice(open_sessions)
        session += [1000 + index * 5 + part for part in range(5)]
        found.append(TraceRequest(0.0, len(session) * block, 10, tuple(session), block))
        if len(session) >= 40:
            open_sessions.remove(session)
    return found


def measure(trace: Path | None, turns: int, quick: bool, say: Callable[[str], None]) -> Json:
    """The row. LoadError where the fleet does not come up or does not answer."""
    requests, origin = traffic(trace, 60 if quick else 700)
    found = []
    with Instance(FLEET) as instance:
        key, token = instance.key("techniques"), instance.admin_token()
        target = Target(parse_url(instance.base_url), "model", endpoint="completions", api_key=key)
        for turn in range(turns):
            both = {}
            for side, policy in SIDES.items():
                document = f"affinity: {{policy: {policy}}}\n"
                asyncio.run(publish(target.origin, token, document, "load.techniques"))
                both[side] = _run(target, requests, f"{secrets.token_hex(8)} {policy}")
                say(f"turn {turn + 1} {policy}: {both[side]['tokens_per_s']:.0f} tokens/s")
            found.append(both)
    return {
        "where": "4 fake replicas (6,000 prompt tokens/s, 100 tokens/s a request) behind a live gateway",
        **{side: {"means": policy, "fleet": f"affinity: {{policy: {policy}}}"} for side, policy in SIDES.items()},
        "cases": [{"workload": f"{len(requests)} requests of {origin}, {callers(requests)} callers", "turns": found}],
        "quality": {"what": "none", "why": "routing does not change what a replica computes"},
    }


def callers(requests: Sequence[TraceRequest]) -> int:
    """Fewer for few requests, which would else all be asked before anything is cached."""
    return min(CALLERS, max(len(requests) // 15, 1))


def _run(target: Target, requests: Sequence[TraceRequest], salt: str) -> Json:
    plan = Plan(
        target=target,
        workload=SaltedTrace(tuple(requests), salt),
        arrivals=ClosedLoop(callers(requests), limit=len(requests)),
        timeout_s=60.0,
        scrape=False,
    )
    collected = execute(plan)
    if collected.interrupted:
        raise KeyboardInterrupt
    run = summarise(plan, collected, Judging(warmup="none"), "affinity")
    failed = run["counts"]["all"]["failed"] + run["counts"]["all"]["rejected"]
    if failed:
        raise LoadError(f"{failed} of {len(requests)} requests failed: {run['failures'][:1]}")
    return latencies(run) | {
        "tokens_per_s": run["rates"]["output_tokens_per_s"]["value"],
        "cached_share": run["tokens"]["cached_share"],
    }


def latencies(run: Json) -> Json:
    """Of a run of `load`, by the names that the engine's rows have too."""
    known = {metric: found for metric, found in run["latency"].items() if found and metric in ("ttft", "itl", "e2e")}
    found = {f"{metric}_{rank}_s": one[rank]["value"] for metric, one in known.items() for rank in ("p50", "p95")}
    return found | {f"{metric}_max_s": one["max"] for metric, one in known.items() if metric == "itl"}
