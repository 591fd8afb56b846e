"""Our definitions and GuideLLM's against one null server whose times are known.

    python -m load.check_guidellm [--json FILE]

GuideLLM is installed by pip into an environment of its own on the first run (--peers). Both tools ask the same
server for the same: first a closed loop, then a constant rate. Exit status 1 if either is off by more than 3 %
anywhere.

Which of their names is which of ours (read in GuideLLM's schemas/base/request_stats.py, version below):

    ours              GuideLLM                   difference
    TTFT from send    time_to_first_token_ms     theirs counts from the actual send; our TTFT from the scheduled one
    TPOT              inter_token_latency_ms     theirs ends at the last token, ours at the end of the answer
    ITL               (none)                     theirs is one mean per request
    (none)            time_per_output_token_ms   E2E / n: holds the first token's time
    E2E from send     request_latency            theirs counts from the actual send
    E2E               request_scheduled_latency  the same
    send lag          request_dispatch_delay     the same
    requests/s        requests_per_second        windows differ, see docs/load.md; the same for
    output tokens/s   output_tokens_per_second

GuideLLM needs no tokenizer here: prompts come from a file and counts from the server's usage. No hub is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from load import results
from load.arrivals import Stage
from load.environments import GUIDELLM, ROOT, interpreter
from load.execute import execute
from load.http1 import parse_url
from load.plan import Arrivals, ClosedLoop, OpenLoop, Plan, Target
from load.scripted import null_server
from load.summary import Judging, summarise
from load.units import LoadError
from load.workload import Contents, Synthetic, parse_lengths

PEER = GUIDELLM.packages[0]
TTFT_S, ITL_S, TOKENS, PROMPT = 0.4, 0.02, 33, 64
CALLERS, RATE = 8, 8.0
LIMIT = 0.03
_TRIES = 3
E2E_S = TTFT_S + (TOKENS - 1) * ITL_S

Json = dict[str, Any]


def ours(url: str, arrivals: Arrivals) -> Json:
    workload = Synthetic(Contents(), parse_lengths(str(PROMPT), "prompt"), parse_lengths(str(TOKENS), "output"))
    plan = Plan(Target(parse_url(url), "scripted"), workload, arrivals, scrape=False)
    for attempt in range(_TRIES):
        run = summarise(plan, execute(plan), Judging(warmup="none"), "check")
        if run["stopped"] or run["counts"]["all"]["failed"]:
            raise LoadError(f"our run failed: {run['stopped'] or run['failures']}")
        if run["generator"]["kept_up"]:
            return run
        print(f"our run {attempt + 1} is void: our generator could not keep up on this machine", file=sys.stderr)
    raise LoadError(
        f"our generator could not keep up {_TRIES} times: is the machine busy? ({run['generator']['rule']})"
    )


def theirs(command: Path, url: str, profile: str, requests: int) -> Json:
    with tempfile.TemporaryDirectory(prefix="check-guidellm-") as folder:
        prompts, out = Path(folder) / "prompts.jsonl", Path(folder) / "out.json"
        lines = (json.dumps({"prompt": f"{'word ' * (PROMPT - 1)}{number}"}) for number in range(requests))
        prompts.write_text("\n".join(lines) + "\n")
        backend = f"kind=openai_http,target={url},model=scripted,max_tokens={TOKENS}"
        arguments = ["run", "--backend", f"{backend},request_format=/v1/chat/completions", "--profile", profile]
        arguments += ["--constraint", f"kind=max_requests,count={requests}", "--data", f"kind=json_file,path={prompts}"]
        arguments += ["--output", f"kind=json,path={out}", "--disable-console"]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [command, *arguments], cwd=folder, env=offline, capture_output=True, text=True, timeout=300
        )
        if done.returncode or not out.exists():
            raise LoadError(f"GuideLLM failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        benchmark = json.loads(out.read_text())["benchmarks"][0]
    completed = benchmark["metrics"]["request_totals"]["successful"]
    if completed != requests:
        raise LoadError(f"GuideLLM completed {completed} of {requests} requests")
    return {name: one["successful"]["mean"] for name, one in benchmark["metrics"].items() if _is_distribution(one)}


def _is_distribution(metric: Any) -> bool:
    return isinstance(metric, dict) and isinstance(metric.get("successful"), dict) and "mean" in metric["successful"]


def rows(mine: Json, peer: Json, throughput: float, *, steady: bool) -> list[Json]:
    """Name, truth and both measured means; None where a tool has no such figure. `steady`: theirs has such a rate."""
    latency = {metric: found and found["mean"]["value"] for metric, found in mine["latency"].items()}
    found = [
        (
            "TTFT from send",
            "time_to_first_token_ms",
            TTFT_S,
            latency["ttft_sent"],
            peer["time_to_first_token_ms"] / 1e3,
        ),
        ("TTFT", None, TTFT_S, latency["ttft"], None),
        ("TPOT", "inter_token_latency_ms", ITL_S, latency["tpot"], peer["inter_token_latency_ms"] / 1e3),
        ("ITL", None, ITL_S, latency["itl"], None),
        (None, "time_per_output_token_ms", E2E_S / TOKENS, None, peer["time_per_output_token_ms"] / 1e3),
        ("E2E from send", "request_latency", E2E_S, latency["e2e_sent"], peer["request_latency"]),
        ("E2E", "request_scheduled_latency", E2E_S, latency["e2e"], peer.get("request_scheduled_latency")),
    ]
    rates = (
        ("requests/s", "requests_per_second", throughput, "requests_per_s"),
        ("output tokens/s", "output_tokens_per_second", throughput * TOKENS, "output_tokens_per_s"),
    )
    for name, theirs_name, truth, key in rates:
        peer_name, peer_rate = (theirs_name, peer[theirs_name]) if steady else (None, None)
        found.append((name, peer_name, truth, mine["rates"][key]["value"], peer_rate))
    return [dict(zip(("ours", "guidellm", "truth", "measured", "peer"), one, strict=True)) for one in found]


def worst(table: list[Json], side: str) -> float:
    return max(abs(float(row[side]) / float(row["truth"]) - 1) for row in table if row[side] is not None)


def show(title: str, table: list[Json], console: Console) -> None:
    grid = Grid("ours", "GuideLLM's", "truth", "ours", "off", "GuideLLM", "off", title=title)
    for row in table:
        cells = []
        for side in ("measured", "peer"):
            value = row[side]
            cells += ["-", ""] if value is None else [f"{value:.5g}", f"{value / row['truth'] - 1:+.2%}"]
        grid.add_row(row["ours"] or "-", row["guidellm"] or "-", f"{row['truth']:.5g}", *cells)
    console.print(grid)


def measure(command: Path, requests: int) -> dict[str, list[Json]]:
    found = {}
    with null_server("--ttft", f"{TTFT_S}s", "--itl", f"{ITL_S}s") as url:
        mine = ours(url, ClosedLoop(CALLERS, limit=requests))
        peer = theirs(command, url, f"kind=concurrent,streams={CALLERS}", requests)
        found[f"{CALLERS} callers"] = rows(mine, peer, CALLERS / E2E_S, steady=True)
        mine = ours(url, OpenLoop((Stage(RATE, RATE, requests / RATE),), "constant"))
        peer = theirs(command, url, f"kind=constant,rate={RATE:g}", requests)
        # theirs counts from the first send to the last answer of a run that begins and ends empty: no steady rate
        found[f"{RATE:g} requests/s, constant"] = rows(mine, peer, RATE, steady=False)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load.check_guidellm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=160, help=f"of each run, a multiple of {CALLERS} (160)")
    parser.add_argument("--peers", type=Path, default=ROOT, help=f"where its environment is, or is made ({ROOT})")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        found = measure(interpreter(GUIDELLM, options.peers).with_name("guidellm"), options.requests)
    except (LoadError, subprocess.SubprocessError, OSError) as error:
        print(f"check_guidellm: {error}", file=sys.stderr)
        return 1
    script = f"TTFT {TTFT_S * 1e3:g} ms, {ITL_S * 1e3:g} ms a token, {TOKENS} tokens: E2E {E2E_S * 1e3:g} ms"
    console.print(f"{PEER}; the null server's script: {script}. Means; seconds.", highlight=False)
    for title, table in found.items():
        show(title, table, console)
    verdict = {side: max(worst(table, side) for table in found.values()) for side in ("measured", "peer")}
    for side, name in (("measured", "ours"), ("peer", "GuideLLM")):
        word = "met   " if verdict[side] <= LIMIT else "MISSED"
        console.print(f"{word} {name}: at most {verdict[side]:.2%} off, {LIMIT:.0%} allowed", highlight=False)
    if options.json:
        results.write(options.json, {"peer": PEER, "rows": found, "machine": results.machine()})
    return 0 if max(verdict.values()) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
