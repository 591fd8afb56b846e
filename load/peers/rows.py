"""From a comparison's document to the rows of its table: every server's figures, and ours over theirs.

A ratio is ours / theirs of the same figure: below 1 is better for times, above 1 for throughput. Where one server
stands between the client and a yardstick (a gateway before its upstream), what it adds to the time to first token is
a figure too.
"""

from __future__ import annotations

import math
from typing import Any

from load.peers.contestants import OURS, PEER, YARDSTICK
from load.peers.workloads import ALONE
from load.show import estimate, warnings
from load.stats import Estimate, ratio

Json = dict[str, Any]
START = "process start to first token"

# Figure → where a run has it.
FIGURES = {
    "ttft_p50": ("latency", "ttft", "p50"),
    "ttft_p95": ("latency", "ttft", "p95"),
    "tpot_p50": ("latency", "tpot", "p50"),
    "e2e_p50": ("latency", "e2e", "p50"),
    "output_tokens_per_s": ("rates", "output_tokens_per_s"),
    "requests_per_s": ("rates", "requests_per_s"),
}
ADDED = "ttft_added_p50"
_SHORT = 0.95


def rows(servers: list[Json]) -> list[Json]:
    """One row a server and task: {kind, task, server, role, figures, ratios: {ours: {figure: …}}, flaws}."""
    found = []
    for kind in dict.fromkeys(server["kind"] for server in servers):
        group = [server for server in servers if server["kind"] == kind]
        found += _of_start(kind, group)
        for task in dict.fromkeys(run["label"] for server in group for run in server["runs"]):
            found += _of_task(kind, task, group)
    return found


def _of_start(kind: str, group: list[Json]) -> list[Json]:
    figures = {
        server["name"]: {"first_token_s": Estimate(server["first_token_s"])}
        for server in group
        if server["first_token_s"] is not None and server["role"] != YARDSTICK
    }
    return _with_ratios(kind, START, group, figures, {})


def _of_task(kind: str, task: str, group: list[Json]) -> list[Json]:
    runs = {server["name"]: run for server in group for run in server["runs"] if run["label"] == task}
    figures = {name: _figures(run) for name, run in runs.items()}
    base = next((figures[one["name"]] for one in group if one["role"] == YARDSTICK and one["name"] in figures), None)
    if task == ALONE and base is not None:
        for server in group:
            if server["role"] != YARDSTICK and server["name"] in figures:
                own = figures[server["name"]]
                own[ADDED] = Estimate(own["ttft_p50"].value - base["ttft_p50"].value)
    flaws = {name: flaws_of(run) for name, run in runs.items()}
    return _with_ratios(kind, task, group, figures, flaws)


def _figures(run: Json) -> dict[str, Estimate]:
    found = {}
    for name, (first, *path) in FIGURES.items():
        value: Any = run[first]
        for step in path:
            value = value and value[step]
        figure = estimate(value)
        if not math.isnan(figure.value):
            found[name] = figure
    return found


def _with_ratios(
    kind: str, task: str, group: list[Json], figures: dict[str, dict[str, Estimate]], flaws: dict[str, list[str]]
) -> list[Json]:
    ours = [server["name"] for server in group if server["role"] == OURS and server["name"] in figures]
    found = []
    for server in group:
        name = server["name"]
        if name not in figures:
            continue
        ratios = {
            own: {
                figure: ratio(figures[own][figure], theirs).as_json()
                for figure, theirs in figures[name].items()
                if figure in figures[own]
            }
            for own in ours
            if server["role"] == PEER
        }
        found.append(
            {
                "kind": kind,
                "task": task,
                "server": name,
                "role": server["role"],
                "figures": {figure: value.as_json() for figure, value in figures[name].items()},
                "ratios": ratios,
                "flaws": flaws.get(name, []),
            }
        )
    return found


def flaws_of(run: Json) -> list[str]:
    """What a reader must know before believing a run's figures, but for what is said of all runs together."""
    known = {"generator": {**run["generator"], "kept_up": True}}
    found = [one for one in warnings(run | known) if not one.endswith("bound no p99")]  # no p99 is shown
    done, tokens = run["counts"]["measured"]["completed"], run["tokens"]["output"]
    if done and tokens < _SHORT * done * run["asked_output"]:
        found.append(f"answers have {tokens / done:.1f} tokens on average, {run['asked_output']} were asked for")
    return found
