"""Policies side by side on one trace in virtual time, against an all-seeing router.

A fleet's capacity is that of round_robin: the requests it completes a second while every replica is busy, measured in a
run that offers far too many. Each policy then runs the whole trace at shares of that rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from policies.simulator import Fleet, SimRequest, SimResult, simulate

OURS = "affinity"
ALL_SEEING = "all-seeing"
SHARES = (0.5, 0.8, 0.95)
# How much of the all-seeing router's hit rate must be reached, and at most what share of the best peer's p95 TTFT from
# which load on: the project's own targets.
HIT_SHARE = 0.95
TTFT_RATIOS = ((0.0, 1.02), (0.8, 0.9))

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy at one load; seconds. hit_share: of the all-seeing router's hit rate.
    ttft_p95_ratio: to the best other policy's (the all-seeing router is none)."""

    load: float
    rate: float
    policy: str
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    hit_rate: float
    hit_share: float
    ttft_p95_ratio: float
    throughput: float
    imbalance: float
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One claim about our policy, its figure, its bound, and whether it holds."""

    load: float
    what: str
    value: float
    bound: float
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    saturation_rate: float
    requests: int
    replicas: int
    rows: tuple[Row, ...]
    targets: tuple[Target, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def saturation_rate(requests: Sequence[SimRequest], fleet: Fleet, seed: int = 0) -> float:
    """Requests a second that round_robin completes while all replicas are busy.

    All requests arrive almost at once: completed requests over the mean time that the replicas spent in steps.
    """
    span = max(requests[-1].arrival_s, 1e-3)
    result = simulate(requests, "round_robin", fleet, rate_scale=span / 1e-3, seed=seed)
    busy_s = sum(replica.busy for replica in result.replicas) / len(result.replicas) * result.duration_s
    return result.completed / busy_s if busy_s else 0.0


def compare(
    requests: Sequence[SimRequest],
    fleet: Fleet,
    policies: Sequence[str],
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    progress: Progress = lambda _what, _arrived: None,
) -> Comparison:
    """Every policy and the all-seeing router at every share of the saturation rate; same requests, same seed."""
    progress("saturation of round_robin", 0)
    saturation = saturation_rate(requests, fleet, seed)
    span = requests[-1].arrival_s - requests[0].arrival_s
    own_rate = (len(requests) - 1) / span
    rows: list[Row] = []
    for share in shares:
        results: dict[str, SimResult] = {}
        for name in (ALL_SEEING, *policies):
            label = f"{name} at {share:.0%}"
            results[name] = simulate(
                requests,
                OURS if name == ALL_SEEING else name,
                replace(fleet, all_seeing=name == ALL_SEEING),
                rate_scale=share * saturation / own_rate,
                seed=seed,
                progress=lambda arrived, label=label: progress(label, arrived),  # type: ignore[misc]
            )
        rows += [_row(share, share * saturation, name, results) for name in results]
    return Comparison(
        saturation_rate=saturation,
        requests=len(requests),
        replicas=fleet.replicas,
        rows=tuple(rows),
        targets=tuple(target for row in rows if row.policy == OURS for target in _targets(row)),
    )


def _row(share: float, rate: float, name: str, results: dict[str, SimResult]) -> Row:
    result = results[name]
    truth = results[ALL_SEEING].hit_rate
    others = [other.ttft(95) for peer, other in results.items() if peer not in (name, ALL_SEEING, OURS)]
    return Row(
        load=share,
        rate=rate,
        policy=name,
        ttft_p50_s=result.ttft(50),
        ttft_p95_s=result.ttft(95),
        ttft_p99_s=result.ttft(99),
        hit_rate=result.hit_rate,
        hit_share=result.hit_rate / truth if truth else 1.0,
        ttft_p95_ratio=result.ttft(95) / min(others) if others else math.nan,
        throughput=result.throughput,
        imbalance=result.imbalance,
        refused=result.refused,
    )


def _targets(row: Row) -> list[Target]:
    bound = [ratio for load, ratio in TTFT_RATIOS if row.load >= load][-1]
    share, ratio = row.hit_share, row.ttft_p95_ratio
    found = [
        Target(
            load=row.load,
            what="token hit rate over the all-seeing router's, at least",
            value=share,
            bound=HIT_SHARE,
            met=share >= HIT_SHARE,
        )
    ]
    if not math.isnan(ratio):
        found.append(
            Target(
                load=row.load,
                what="p95 TTFT over the best peer's, at most",
                value=ratio,
                bound=bound,
                met=ratio <= bound,
            )
        )
    return found


def plot(comparison: Comparison, path: str) -> None:
    """p95 TTFT and hit rate over the load, one line per policy, as a PNG. Needs matplotlib."""
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name in dict.fromkeys(row.policy for row in comparison.rows):
        rows = sorted((row for row in comparison.rows if row.policy == name), key=lambda row: row.load)
        style = "--" if name == ALL_SEEING else "-"
        left.plot([row.load for row in rows], [row.ttft_p95_s for row in rows], style, marker="o", label=name)
        right.plot([row.load for row in rows], [row.hit_rate for row in rows], style, marker="o", label=name)
    left.set(xlabel="share of round_robin's saturation rate", ylabel="p95 TTFT, seconds", yscale="log")
    right.set(xlabel="share of round_robin's saturation rate", ylabel="token hit rate", ylim=(0, None))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
