"""Results side by side: ratios of every figure to the first file's, with intervals, and what was asked differently."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from load.show import NAMES, estimate, spread, warnings
from load.stats import Estimate, ratio

Json = dict[str, Any]
_RANKS = ("mean", "p50", "p95", "p99")
# What may differ without making runs incomparable.
_FREE = {"url", "model", "seed", "workers", "metrics", "timeout", "drain", "insecure"}


def flatten(documents: list[tuple[str, Json]]) -> list[tuple[str, Json, Json]]:
    """(name, settings, run) of every run of every file; one that brought nothing is left out."""
    found = []
    for name, document in documents:
        runs = document["runs"]
        for run in runs:
            title = name if len(runs) == 1 else f"{name} · {run['label']}"
            found.append((title, document["settings"], run))
    return found


def pairs(documents: list[tuple[str, Json]]) -> list[list[tuple[str, Json, Json]]]:
    """Runs to compare with each other: those of one label when files hold several, else each file's only one.

    The first of every group is its base.
    """
    runs = flatten(documents)
    if all(len(document["runs"]) == 1 for _, document in documents) or len(documents) == 1:
        return [runs]
    groups: dict[str, list[tuple[str, Json, Json]]] = {}
    for one in runs:
        groups.setdefault(one[2]["label"], []).append(one)
    return [group for group in groups.values() if len(group) > 1]


def rows(base: Json, other: Json) -> list[tuple[str, Estimate, Estimate, Estimate]]:
    """(figure, base's, other's, other / base) for every figure that both have."""
    found = []
    for metric, title in NAMES.items():
        ours, theirs = base["latency"][metric], other["latency"][metric]
        if ours is None or theirs is None:
            continue
        found += [(f"{title} {rank}", estimate(ours[rank]), estimate(theirs[rank])) for rank in _RANKS]
    for name in ("requests_per_s", "output_tokens_per_s"):
        found.append((name.replace("_", " "), estimate(base["rates"][name]), estimate(other["rates"][name])))
    if base["slo"] and other["slo"]:
        pair = [estimate(run["slo"]["goodput_requests_per_s"]) for run in (base, other)]
        found.append(("goodput requests per s", pair[0], pair[1]))
    return [(name, ours, theirs, ratio(theirs, ours)) for name, ours, theirs in found]


def differences(base: Json, other: Json) -> list[str]:
    """Settings that were not the same, as far as they matter."""
    names = sorted((base.keys() | other.keys()) - _FREE)
    return [f"{name}: {base.get(name)!r} / {other.get(name)!r}" for name in names if base.get(name) != other.get(name)]


def show(console: Console, group: list[tuple[str, Json, Json]]) -> None:
    (base_name, base_settings, base), *others = group
    for name, settings, run in others:
        grid = Grid("", title=f"{name} against {base_name}", title_justify="left")
        for head in (base_name, name, "ratio (95 % interval)"):
            grid.add_column(head, justify="right")
        for figure, ours, theirs, both in rows(base, run):
            scale = "number" if figure.endswith("per s") else "time"
            sure = both.bounded and not both.low <= 1 <= both.high
            shown = spread(both.as_json(), "number")
            grid.add_row(
                figure,
                spread({**ours.as_json(), "low": None}, scale),
                spread({**theirs.as_json(), "low": None}, scale),
                f"[bold]{shown}[/]" if sure else shown,
            )
        console.print(grid)
        for line in differences(base_settings, settings):
            console.print(f"[yellow]asked differently:[/] {line}", highlight=False)
        for title, one in ((base_name, base), (name, run)):
            for warning in warnings(one):
                console.print(f"[yellow]{title}:[/] {warning}", highlight=False)
    console.print("Bold: the interval excludes 1. Intervals: each file's own, combined by MOVER.", style="dim")


def as_json(group: list[tuple[str, Json, Json]]) -> list[Json]:
    (base_name, base_settings, base), *others = group
    return [
        {
            "base": base_name,
            "other": name,
            "asked_differently": differences(base_settings, settings),
            "figures": [
                {"name": figure, "base": a.as_json(), "other": b.as_json(), "ratio": c.as_json()}
                for figure, a, b, c in rows(base, run)
            ],
        }
        for name, settings, run in others
    ]
