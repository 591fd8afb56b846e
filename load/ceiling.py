"""How much load one core of the generator makes, against the null server on another core, beside httpx and aiohttp.

    python -m load.ceiling [--seconds 4] [--json FILE] [--check]

Generator and its parent process share one core. "streams" are answers of 64 tokens, an event each, 10 ms apart. Our
own client does in these runs all that it does in any run: schedule, parse every event, take its time, keep it. The
libraries only read and, in streams, decode each event's JSON. Send lag is measured in open loops at half of the rates
required.
--check exits with 1 if a target is missed: 2,000 requests/s, 15,000 streamed tokens/s, p99 of the lag 5 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from load import loop as loops
from load import results
from load.arrivals import Stage
from load.execute import Collected, execute
from load.http1 import parse_url
from load.plan import ClosedLoop, OpenLoop, Plan, Target
from load.scripted import null_server, pin
from load.units import LoadError
from load.workload import Contents, Synthetic, parse_lengths

TOKENS = 64
TARGETS = {"requests_per_s": 2_000, "tokens_per_s": 15_000, "lag_p99_s": 0.005}
_CALLERS = {"unary": 32, "streams": 512}
_PACE = ("--ttft", "10ms", "--itl", "10ms")

Json = dict[str, Any]


def plan(url: str, kind: str, arrivals: ClosedLoop | OpenLoop) -> Plan:
    stream = kind == "streams"
    workload = Synthetic(
        Contents(), parse_lengths("32", "prompt"), parse_lengths(str(TOKENS if stream else 1), "output")
    )
    target = Target(parse_url(url), "scripted", stream=stream)
    return Plan(target, workload, arrivals, timeout_s=60, drain_s=10, scrape=False)


def own(url: str, kind: str, seconds: float) -> Json:
    got = execute(plan(url, kind, ClosedLoop(_CALLERS[kind], duration_s=seconds)))
    return _figures(got, kind, seconds)


def lag(url: str, kind: str, seconds: float) -> Json:
    rate = TARGETS["requests_per_s"] / 2 if kind == "unary" else TARGETS["tokens_per_s"] / 2 / TOKENS
    got = execute(plan(url, kind, OpenLoop((Stage(rate, rate, seconds),))))
    lags = np.array([record.begun - record.scheduled for record in got.records])
    return {
        **_figures(got, kind, seconds),
        "offered_requests_per_s": rate,
        "lag_p50_s": float(np.percentile(lags, 50)),
        "lag_p99_s": float(np.percentile(lags, 99)),
        "lag_max_s": float(lags.max()),
        "busy": got.ends[0].busy,
        "longest_stall_s": got.ends[0].longest,
    }


def _figures(got: Collected, kind: str, seconds: float) -> Json:
    failed = [record for record in got.records if record.error not in ("", "unfinished")]
    if got.stopped or failed:
        raise LoadError(f"{got.stopped or failed[0].detail}")
    over = got.start + seconds
    requests = sum(record.end <= over and not record.error for record in got.records)
    tokens = sum(sum(when <= over for when in record.chunks) for record in got.records)
    return {"requests_per_s": requests / seconds, "tokens_per_s": tokens / seconds if kind == "streams" else 0.0}


# ---------------------------------------------------------------------------------------------------------- libraries

Saw = Callable[[], None]  # to be called for every token
Ask = Callable[[Saw], Awaitable[None]]  # one request


def library(name: str, url: str, kind: str, seconds: float) -> Json:
    return loops.run(_library(name, url, kind, seconds))


async def _library(name: str, url: str, kind: str, seconds: float) -> Json:
    callers = _CALLERS[kind]
    stream = kind == "streams"
    body = {"model": "scripted", "messages": [{"role": "user", "content": "word " * 32}], "stream": stream}
    body["max_tokens"] = TOKENS if stream else 1
    path = f"{url}/v1/chat/completions"
    if name == "httpx":
        limits = httpx.Limits(max_connections=callers, max_keepalive_connections=callers)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            return await _closed(lambda saw: _httpx(client, path, body, saw), callers, seconds)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=callers)) as session:
        return await _closed(lambda saw: _aiohttp(session, path, body, saw), callers, seconds)


async def _httpx(client: httpx.AsyncClient, url: str, body: Json, saw: Saw) -> None:
    if not body["stream"]:
        (await client.post(url, json=body)).json()
        return
    async with client.stream("POST", url, json=body) as response:
        async for line in response.aiter_lines():
            if _is_token(line.encode()):
                saw()


async def _aiohttp(session: aiohttp.ClientSession, url: str, body: Json, saw: Saw) -> None:
    async with session.post(url, json=body) as response:
        if not body["stream"]:
            await response.json()
            return
        async for line in response.content:
            if _is_token(line):
                saw()


def _is_token(line: bytes) -> bool:
    return line.startswith(b"data: {") and bool(json.loads(line[6:])["choices"][0]["delta"].get("content"))


async def _closed(ask: Ask, callers: int, seconds: float) -> Json:
    end = time.monotonic() + seconds
    requests = tokens = 0

    def saw() -> None:
        nonlocal tokens
        tokens += time.monotonic() < end

    async def caller() -> None:
        nonlocal requests
        while time.monotonic() < end:
            await ask(saw)
            requests += time.monotonic() < end

    await asyncio.gather(*(caller() for _ in range(callers)))
    return {"requests_per_s": requests / seconds, "tokens_per_s": tokens / seconds}


# ------------------------------------------------------------------------------------------------------------- report


def measure(seconds: float) -> Json:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    pin(cores[0])
    found: Json = {"closed": {}, "lag": {}}
    for kind in ("unary", "streams"):
        options = _PACE if kind == "streams" else ()
        with null_server(*options, core=cores[-1]) as url:
            found["closed"][kind] = {
                "signalbox": own(url, kind, seconds),
                "aiohttp": library("aiohttp", url, kind, seconds),
                "httpx": library("httpx", url, kind, seconds),
            }
            found["lag"][kind] = lag(url, kind, 2 * seconds)  # one stall of the machine is no p99
    found["targets"] = {
        "requests_per_s": found["closed"]["unary"]["signalbox"]["requests_per_s"] >= TARGETS["requests_per_s"],
        "tokens_per_s": found["closed"]["streams"]["signalbox"]["tokens_per_s"] >= TARGETS["tokens_per_s"],
        "lag_p99": all(one["lag_p99_s"] <= TARGETS["lag_p99_s"] for one in found["lag"].values()),
    }
    return found


def show(found: Json, console: Console) -> None:
    grid = Grid("one core", "requests/s", "ratio", "streamed tokens/s", "ratio", title="As fast as it goes")
    unary, streams = found["closed"]["unary"], found["closed"]["streams"]
    for name in unary:
        rates = (unary[name]["requests_per_s"], streams[name]["tokens_per_s"])
        base = (unary["signalbox"]["requests_per_s"], streams["signalbox"]["tokens_per_s"])
        cells = [f"{rates[0]:,.0f}", f"{rates[0] / base[0]:.2f}x", f"{rates[1]:,.0f}", f"{rates[1] / base[1]:.2f}x"]
        grid.add_row(name, *cells)
    console.print(grid)
    grid = Grid("open loop", "requests/s", "tokens/s", "lag p50", "p99", "max", "core busy", title="Send lag")
    for kind, one in found["lag"].items():
        lags = [f"{one[f'lag_{rank}_s'] * 1e3:.2f} ms" for rank in ("p50", "p99", "max")]
        rates = (f"{one['offered_requests_per_s']:.0f}", f"{one['tokens_per_s']:.0f}" if kind == "streams" else "")
        grid.add_row(kind, *rates, *lags, f"{one['busy']:.0%}")
    console.print(grid)
    for name, met in found["targets"].items():
        console.print(f"{'met   ' if met else 'MISSED'} {name}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load.ceiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of each closed loop; open loops take twice as long (4)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    try:
        found = measure(options.seconds)
    except LoadError as error:
        print(f"ceiling: {error}", file=sys.stderr)
        return 1
    show(found, Console())
    if options.json:
        results.write(options.json, {**found, "machine": results.machine()})
    return 1 if options.check and not all(found["targets"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
