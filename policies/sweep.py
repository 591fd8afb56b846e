"""A policy's knob turned, and the load with it: what an in-SLO token costs, and how many of them a second there are.

    knob = Knob("groups.chat.right_size.cost_weight", (0.0, 0.5, 2.0))
    points = sweep(asks, world, document, knob, (0.5, 1.0), Slo(ttft_s=0.5))

Every point is a simulation of the same recorded requests, `load` times as fast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from policies.document import FleetNames, PolicyDocument, parse
from policies.sim_outcome import COMPLETED, Outcomes
from policies.sim_rules import Ask, World, compiled, simulate_rules
from replicas.protocol import ConfigError

PICO = 10**12


@dataclass(frozen=True, slots=True)
class Knob:
    """A place in the policy document, keys with dots between them, and the values to try there."""

    path: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds that a request may take to its first token, and to its end."""

    ttft_s: float = math.inf
    e2e_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One simulation. goodput: completed requests a second that meet the SLO; live: what serves now.

    usd_per_million: dollars of all requests over their output tokens within the SLO; None without any.
    """

    value: Any
    load: float
    live: bool
    goodput: float
    tokens_per_s: float
    attainment: float
    usd_per_million: float | None
    ttft_p95_s: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def turned(document: PolicyDocument, knob: str, value: Any, names: FleetNames) -> PolicyDocument:
    """The document with another value at the knob's place. ConfigError where there is no such place or value."""
    stated: dict[str, Any] = json.loads(document.normalised())
    *way, last = knob.split(".")
    place = stated
    for key in way:
        found = place.setdefault(key, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{knob!r}: there is nothing below {key!r}")
        place = found
    place[last] = value
    return parse(json.dumps(stated), f"the policy with {knob}={value!r}", names=names)


def sweep(
    asks: Sequence[Ask],
    world: World,
    document: PolicyDocument,
    knob: Knob,
    loads: Sequence[float],
    slo: Slo,
    *,
    epoch: float = 0.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Every value at every load, and last the document as it is at its own load."""
    names = FleetNames(tuple(model.name for model in world.models), tuple(set(world.served) - _own_names(world)))
    points = []
    for value in knob.values:
        rules = compiled(1, turned(document, knob.path, value, names), world)
        for load in loads:
            progress(f"{knob.path}={value} at {load:g} times the load")
            outcomes = simulate_rules(asks, world, rules, epoch=epoch, rate_scale=load, seed=seed)
            points.append(_point(outcomes, slo, value, load, live=False))
    progress("the live policy")
    outcomes = simulate_rules(asks, world, compiled(0, document, world), epoch=epoch, seed=seed)
    return [*points, _point(outcomes, slo, None, 1.0, live=True)]


def _own_names(world: World) -> set[str]:
    return {model.name for model in world.models}


def _point(outcomes: Outcomes, slo: Slo, value: Any, load: float, *, live: bool) -> Point:
    ttft, e2e, arrived = (outcomes.column(name) for name in ("ttft_s", "e2e_s", "arrived"))
    done = outcomes.column("ends") == COMPLETED
    with np.errstate(invalid="ignore"):
        good = done & (ttft <= slo.ttft_s) & (e2e <= slo.e2e_s)
    span = max(float(np.max(arrived[done] + e2e[done], initial=0.0) - arrived[0]), 1e-9)
    tokens = int(outcomes.column("output_tokens")[good].sum())
    usd = float(outcomes.column("cost").sum()) / PICO
    return Point(
        value=value,
        load=load,
        live=live,
        goodput=float(good.sum()) / span,
        tokens_per_s=tokens / span,
        attainment=float(good.mean()),
        usd_per_million=usd / tokens * 1e6 if tokens else None,
        ttft_p95_s=float(np.percentile(ttft[done], 95)) if done.any() else None,
    )


def plot(points: Sequence[Point], knob: str, path: str) -> None:
    """Cost per million in-SLO tokens over goodput, the live point a star; a PNG, by matplotlib."""
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for value in dict.fromkeys(point.value for point in points if not point.live):
        rows = sorted((p for p in points if not p.live and p.value == value), key=lambda p: p.load)
        shown = [(p.goodput, p.usd_per_million, p.load) for p in rows if p.usd_per_million is not None]
        axes.plot([x for x, _, _ in shown], [y for _, y, _ in shown], marker="o", label=f"{value}")
        for x, y, load in shown:
            axes.annotate(f"x{load:g}", (x, y), fontsize=7)
    for p in points:
        if p.live and p.usd_per_million is not None:
            axes.plot([p.goodput], [p.usd_per_million], marker="*", markersize=16, color="black", label="live")
    axes.set(xlabel="requests a second within the SLO", ylabel="USD per million output tokens within the SLO")
    axes.legend(title=knob)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
