"""What the gateway costs: the whole path against a bare uvicorn handler, same machine, same client, one run.

    python -m load.bench_gateway [--seconds 8] [--probes 300] [--json FILE]

Starts a fleet of fake engines with `signalbox up` (HAProxy → gateway → replica) in a home of its own and a bare ASGI
handler beside it. On for every request, because nothing switches them off: key check, validation, tokenisation, the
policy generation, the prefix index, explanations, metrics and the ledger's record of what was used. A second key of the
same gateway falls under a budget and a rate limit besides, so that each of its requests is reserved and settled by
transactions. Two measurements of each:

  probe   one stream at a time, a token every 5 ms; all take turns, so that drift hits all
  wrk     16 connections, prompts that all differ; whole answers of one token, then streams of 64

Where the time goes is what the gateway itself says on /metrics, before and after. Exits non-zero only when something
fails or answers wrongly: a benchmark measures, it does not judge.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from load.own_instance import free_port, instance
from load.units import LoadError

TOKENS = 64
PACE_S = 0.005
CONNECTIONS = 16
BARE, PLAIN, LIMITED = "bare uvicorn", "signalbox", "budgeted"
TITLE = (
    "On: keys, validation, tokenisation, policy, prefix index, explanations, metrics, ledger; "
    f"{LIMITED}: a budget and a rate limit too"
)

_FLEET = """
models:
  - {name: paced, engine: fake, num_cpus: 0.1, engine_settings: {tokens_per_s: 200}}
  - {name: fast, engine: fake, num_cpus: 0.1}
"""

# Large enough to refuse nobody.
_POLICY = f"""
models:
  paced: {{price: {{input: 0.1, output: 0.3}}}}
  fast: {{price: {{input: 0.1, output: 0.3}}}}
budgets:
  - {{key: {LIMITED}, usd: 100000, tokens: 1000000000, window: total}}
rate_limits:
  - {{key: {LIMITED}, requests_per_minute: 10000000, tokens_per_minute: 1000000000, concurrency: 10000}}
"""

_SCRIPT = """
local n = 0
request = function()
  n = n + 1
  local headers = {["Authorization"] = "Bearer %(key)s", ["Content-Type"] = "application/json"}
  return wrk.format("POST", "/v1/chat/completions", headers, string.format('%(body)s', n))
end
"""


class BenchmarkFailed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Target:
    """`paced` and `fast` are (base URL, model): a token every 5 ms, and as fast as it goes."""

    name: str
    paced: tuple[str, str]
    fast: tuple[str, str]
    key: str


@dataclass(frozen=True, slots=True)
class Load:
    """One wrk run. p50 and p99 are milliseconds of whole answers."""

    per_second: float
    p50_ms: float
    p99_ms: float


def body(model: str, question: str, *, tokens: int, stream: bool) -> str:
    messages = [
        {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
        {"role": "user", "content": f"What is the capital of country number {question}?"},
    ]
    request = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    return json.dumps(request | ({"stream": True} if stream else {}), separators=(",", ":"))


# ------------------------------------------------------------------------------------------------------------ servers


@contextmanager
def bare_handler(pace_s: float) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "load.bare_handler:app", "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(command, env={**os.environ, "PACE_S": str(pace_s)})
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            raise BenchmarkFailed("the bare handler did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)


@contextmanager
def fleet() -> Iterator[tuple[str, Mapping[str, str]]]:
    """(base URL, API keys by name) of a fleet of fake engines that lives as long as the block."""
    with instance(_FLEET, PLAIN, LIMITED) as served:
        policy = Path(served.environment["SIGNALBOX_HOME"]) / "policy.yaml"
        policy.write_text(_POLICY)
        served.signalbox("policy", "publish", str(policy))
        yield served.base_url, served.keys


# -------------------------------------------------------------------------------------------------------------- probe


class Probe:
    """One keep-alive connection that measures single streams."""

    def __init__(self, base_url: str, model: str, key: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=30)
        self._model = model
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._asked = 0

    def __enter__(self) -> Probe:
        self._connection.connect()
        sock = self._connection.sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def headers(self) -> set[str]:
        """Names of an answer's headers, in lower case."""
        request = body(self._model, "0", tokens=1, stream=False)
        self._connection.request("POST", "/v1/chat/completions", request, self._headers)
        response = self._connection.getresponse()
        response.read()
        return {name.lower() for name, _ in response.getheaders()}

    def arrivals(self, tokens: int) -> tuple[list[float], list[str]]:
        """Seconds from sending to each event that carries text, and the texts."""
        self._asked += 1
        request = body(self._model, str(self._asked), tokens=tokens, stream=True)
        began = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", request, self._headers)
        response = self._connection.getresponse()
        if response.status != 200:
            raise BenchmarkFailed(f"{response.status}: {response.read().decode()}")
        times, texts, done = [], [], False
        while line := response.readline():
            now = time.perf_counter() - began
            if line == b"data: [DONE]\n":
                done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if text := event["choices"][0]["delta"].get("content"):
                    times.append(now)
                    texts.append(text)
        if not done:
            raise BenchmarkFailed("a stream ended without [DONE]")
        return times, texts


def probe(targets: list[Target], count: int) -> dict[str, dict[str, float]]:
    """Milliseconds to the first token and between tokens, targets taking turns."""
    probes = [Probe(*target.paced, target.key) for target in targets]
    first: dict[str, list[float]] = {target.name: [] for target in targets}
    gaps: dict[str, list[float]] = {target.name: [] for target in targets}
    for each in probes:
        each.__enter__()
    try:
        for turn in range(count + 10):
            for target, each in zip(targets, probes, strict=True):
                times, _ = each.arrivals(8)
                if turn >= 10:  # the first few warm caches and connections up
                    first[target.name].append(times[0])
                    gaps[target.name] += np.diff(times).tolist()
    finally:
        for each in probes:
            each.__exit__()
    return {
        target.name: {
            "ttft_p50": _percentile(first[target.name], 50),
            "ttft_p99": _percentile(first[target.name], 99),
            "gap_p50": _percentile(gaps[target.name], 50),
            "gap_p99": _percentile(gaps[target.name], 99),
        }
        for target in targets
    }


def _percentile(seconds: list[float], rank: float) -> float:
    return float(np.percentile(seconds, rank)) * 1e3


def check_events(target: Target) -> None:
    """Every token is an event of its own: of one letter, since the fake tokenizer's tokens are bytes."""
    with Probe(*target.fast, target.key) as one:
        _, texts = one.arrivals(TOKENS)
    if len(texts) != TOKENS or max(map(len, texts)) > 1:
        raise BenchmarkFailed(f"{len(texts)} events for {TOKENS} tokens")


def check_limited(target: Target) -> None:
    """Only the limited key's answers may, and must, say what its rate limit stands at."""
    with Probe(*target.fast, target.key) as one:
        headers = one.headers()
    if any(name.startswith("x-ratelimit-") for name in headers) is not (target.name == LIMITED):
        raise BenchmarkFailed(f"the policy does not concern {target.name} as it should: {sorted(headers)}")


# ---------------------------------------------------------------------------------------------------------------- wrk


def wrk(target: Target, *, stream: bool, seconds: int) -> Load:
    base_url, model = target.fast
    template = body(model, "%d", tokens=TOKENS if stream else 1, stream=stream)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT % {"key": target.key, "body": template})
        script.flush()
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "--timeout", "10s"]
        done = subprocess.run([*command, "-s", script.name, base_url], capture_output=True, text=True, check=False)
    report = done.stdout
    failed = re.search(r"(Non-2xx.*|Socket errors.*)", report)
    if done.returncode or failed:
        raise BenchmarkFailed(f"wrk on {target.name}: {failed[1] if failed else done.stderr or report}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", report)
    ranks = {rank: _milliseconds(*match) for rank, *match in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)\b", report)}
    if rate is None or set(ranks) != {"50", "99"}:
        raise BenchmarkFailed(f"wrk's report has changed:\n{report}")
    return Load(float(rate[1]), ranks["50"], ranks["99"])


def _milliseconds(number: str, unit: str) -> float:
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


# ---------------------------------------------------------------------------------------------------- the gateway's own


_SERIES = re.compile(
    r'^(?:signalbox_gateway_stage_seconds_(sum|count)\{stage="(\w+)"\}|(process_cpu_seconds_total)) (\S+)', re.MULTILINE
)


def readings(base_url: str) -> dict[str, float]:
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {process or f"{stage}_{what}": float(value) for what, stage, process, value in _SERIES.findall(text)}


def spent(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Microseconds per request by stage, in order, and `cpu` of the gateway's process."""
    grown = {name: after[name] - before[name] for name in before}
    requests = max(grown["auth_count"], 1.0)
    stages = [name.removesuffix("_count") for name in grown if name.endswith("_count")]
    each = {stage: grown[f"{stage}_sum"] / requests * 1e6 for stage in stages}
    return each | {"cpu": grown["process_cpu_seconds_total"] / requests * 1e6}


# ------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, slots=True)
class Result:
    """probe: target → figure → ms. wrk: kind → target → load. spent: kind → stage → µs per request."""

    probe: dict[str, dict[str, float]]
    wrk: dict[str, dict[str, Load]]
    spent: dict[str, dict[str, float]]


def show(result: Result, console: Console) -> None:
    console.print(TITLE)
    bare, ours = result.probe[BARE], [name for name in result.probe if name != BARE]
    heads = [head for name in ours for head in (name, "added")]
    table = Table("one stream at a time, ms", BARE, *heads, title="Probe: a token every 5 ms")
    for name in bare:
        figures = [(result.probe[target][name], result.probe[target][name] - bare[name]) for target in ours]
        cells = [cell for figure, added in figures for cell in (f"{figure:.2f}", f"{added:+.2f}")]
        table.add_row(name.replace("_", " "), f"{bare[name]:.2f}", *cells)
    console.print(table)
    table = Table("", "target", "per second", "ratio", "p50 ms", "p99 ms", title=f"wrk, {CONNECTIONS} connections")
    for name, loads in result.wrk.items():
        for target, load in loads.items():
            ratio = load.per_second / loads[BARE].per_second
            table.add_row(
                name, target, f"{load.per_second:.0f}", f"{ratio:.2f}", f"{load.p50_ms:.1f}", f"{load.p99_ms:.1f}"
            )
    console.print(table)
    stages = [*result.spent["probe"], "cpu"]
    table = Table("", *stages, title="Where a request's time goes in the gateway, µs (cpu: of its process)")
    for name, each in result.spent.items():
        table.add_row(name, *(f"{each[stage]:.0f}" if stage in each else "" for stage in stages))
    console.print(table)


def measure(seconds: int, probes: int) -> Result:
    with bare_handler(0) as bare, bare_handler(PACE_S) as bare_paced, fleet() as (url, keys):
        targets = [Target(BARE, (bare_paced, "paced"), (bare, "fast"), keys[PLAIN])]
        targets += [Target(name, (url, "paced"), (url, "fast"), key) for name, key in keys.items()]
        for target in targets[1:]:
            check_events(target)
            check_limited(target)
        before = readings(url)
        latencies = probe(targets, probes)
        costs = {"probe": spent(before, readings(url))}
        del costs["probe"]["cpu"]  # mostly of waiting for the next token
        loads: dict[str, dict[str, Load]] = {}
        for name, stream in (("unary", False), (f"streams of {TOKENS}", True)):
            loads[name] = {}
            for target in targets:
                wrk(target, stream=stream, seconds=1)
                before = readings(url)
                loads[name][target.name] = wrk(target, stream=stream, seconds=seconds)
                if target.name != BARE:
                    costs[f"{name}, {target.name}"] = spent(before, readings(url))
        return Result(latencies, loads, costs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the gateway costs against a bare uvicorn handler.")
    parser.add_argument("--seconds", type=int, default=8, help="of each wrk run (default 8)")
    parser.add_argument("--probes", type=int, default=300, help="streams per target (default 300)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    console = Console()
    try:
        if shutil.which("wrk") is None:
            raise BenchmarkFailed("wrk is not installed; `apt-get install wrk` (or brew) brings it")
        result = measure(options.seconds, options.probes)
    except (BenchmarkFailed, LoadError, OSError, subprocess.TimeoutExpired) as error:
        sys.exit(f"bench_gateway: {error}")
    show(result, console)
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
