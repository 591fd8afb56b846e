"""From a measured run to the replica model that would have given it: the simulator, turned round.

    observed = observe(run, trace)                 # a run of `signalbox load`, as its JSON tells it
    found = fit(observed, Fleet(replicas=2))

The run's own requests, at their own times, are simulated again and again; Nelder-Mead (The Computer Journal 1965) moves
the logarithms of prefill_rate, step_s, floor_s, decode_s, context_s and gateway_s until first tokens and the time per
further token come out as measured, request by request and in their distributions. A run identifies what it exercises:
prompts of several lengths, and batches from one sequence to as many as matter. Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from policies.sim_fleet import Fleet, SimRequest
from policies.sim_outcome import Floats
from policies.sim_replica import ReplicaModel
from policies.simulator import prepare, simulate
from policies.traces import TraceRequest
from replicas.protocol import prefix_root

SCHEMA = "signalbox.replica/1"
_RATES = ("prefill_rate", "step_s", "floor_s", "decode_s", "context_s")
_LEAST = 20  # requests from which on a fit means something


@dataclass(frozen=True, slots=True)
class Observed:
    """Completed requests in the order of their arrival: what was asked, and seconds to first token and end."""

    requests: tuple[SimRequest, ...]
    ttft_s: Floats
    e2e_s: Floats

    @property
    def outputs(self) -> Floats:
        return np.array([request.output_tokens for request in self.requests], np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """ttft_error, tpot_error: median factor by which a request's figure is off, less one."""

    model: ReplicaModel
    gateway_s: float
    requests: int
    ttft_error: float
    tpot_error: float

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "replica": asdict(self.model),
            "gateway_s": self.gateway_s,
            "calibration": {"requests": self.requests, "ttft_error": self.ttft_error, "tpot_error": self.tpot_error},
        }


def read_model(document: Any) -> tuple[ReplicaModel, float]:
    """(model, gateway_s) of a calibration's JSON; ValueError says what is wrong with it."""
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        raise ValueError(f"not a replica model: it has no schema {SCHEMA!r}")
    known = {one.name for one in fields(ReplicaModel)}
    stated = document.get("replica")
    if not isinstance(stated, Mapping) or (strange := sorted(set(stated) - known)):
        raise ValueError(f"replica has no {strange[0]!r}" if isinstance(stated, Mapping) else "replica is missing")
    numbers = {**stated, "gateway_s": document.get("gateway_s", 0.0)}
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r}")
    return ReplicaModel(**stated), float(numbers["gateway_s"])


def observe(run: Mapping[str, Any], trace: Sequence[TraceRequest] | None = None, block_size: int = 16) -> Observed:
    """The completed requests of a run of `signalbox load`. ValueError where its rows do not tell enough.

    trace: what was replayed, so that prefixes are shared as they were; without it a prompt is as long as what had to be
    computed of it.
    """
    rows = run.get("requests")
    wanted = ("index", "scheduled", "first", "end", "error", "prompt_tokens", "completion_tokens", "cached_tokens")
    if not isinstance(rows, Mapping) or any(name not in rows for name in wanted):
        raise ValueError("it holds no requests with their times: give a run of `signalbox load run --out FILE`")
    known = prepare(trace, block_size) if trace is not None else None
    found: list[tuple[SimRequest, float, float]] = []
    for index, due, first, end, error, prompt, output, cached in zip(*(rows[name] for name in wanted), strict=True):
        if error or first is None or end is None or prompt < 1 or output < 1:
            continue
        if known is not None:
            asked = known[index % len(known)]
            if asked.prompt_tokens != prompt:
                raise ValueError(f"request {index} had {prompt} prompt tokens, the trace says {asked.prompt_tokens}")
            request = replace(asked, arrival_s=due, output_tokens=output)
        else:
            request = SimRequest(due, prompt - max(cached, 0), output, (), prefix_root("", "calibration"))
        found.append((request, first - due, end - due))
    if len(found) < _LEAST:
        raise ValueError(f"{len(found)} completed requests with times are too few: at least {_LEAST} are needed")
    found.sort(key=lambda one: one[0].arrival_s)
    return Observed(
        tuple(request for request, _, _ in found),
        np.array([ttft for _, ttft, _ in found]),
        np.array([e2e for _, _, e2e in found]),
    )


def fit(observed: Observed, fleet: Fleet, *, rounds: int = 260) -> Calibration:
    """The model of the fleet's replicas with which the simulator tells best what was observed. Some ten seconds."""

    def fleet_of(point: Floats) -> Fleet:
        *rates, gateway_s = np.exp(point).tolist()
        model = replace(fleet.model, **dict(zip(_RATES, rates, strict=True)))
        return replace(fleet, model=model, gateway_s=gateway_s)

    def loss(point: Floats) -> float:
        if np.abs(point).max() > 25:
            return math.inf
        ttft, tpot, shapes = (float(np.minimum(off, 2.0).mean()) for off in _off(observed, fleet_of(point)))
        return ttft + tpot + 4 * shapes

    best = nelder_mead(loss, _guess(observed), rounds=rounds)
    best = nelder_mead(loss, best, rounds=rounds // 2, size=0.15)  # once more, from a fresh simplex
    found = fleet_of(best)
    ttft, tpot = (float(np.expm1(np.median(off))) for off in _off(observed, found)[:2])
    return Calibration(
        model=found.model,
        gateway_s=found.gateway_s,
        requests=len(observed.requests),
        ttft_error=ttft,
        tpot_error=tpot,
    )


def _off(observed: Observed, fleet: Fleet) -> tuple[Floats, Floats, Floats]:
    """Distances of logarithms: of each first token, each time per further token, and of both distributions."""
    outcomes = simulate(observed.requests, "affinity", fleet).outcomes
    ttft, e2e = outcomes.column("ttft_s"), outcomes.column("e2e_s")
    several = observed.outputs > 1
    with np.errstate(invalid="ignore"):
        pairs = (
            (ttft, observed.ttft_s),
            (e2e[several] - ttft[several], observed.e2e_s[several] - observed.ttft_s[several]),
        )
    apart = [np.nan_to_num(np.abs(np.log(np.maximum(a, 1e-6) / np.maximum(b, 1e-6))), nan=2.0) for a, b in pairs]
    ranks = [25, 50, 75, 90, 95]
    shapes = [np.abs(np.log(np.nanpercentile(a, ranks) / np.nanpercentile(b, ranks))) for a, b in pairs if a.size]
    return apart[0], apart[1] if apart[1].size else np.zeros(1), np.concatenate(shapes)


def _guess(observed: Observed) -> Floats:
    several = observed.outputs > 1
    gaps = (observed.e2e_s - observed.ttft_s)[several] / (observed.outputs[several] - 1)
    step = max(float(np.percentile(gaps, 10)) if gaps.size else 0.01, 1e-5)
    prompts = np.array([request.prompt_tokens for request in observed.requests], np.float64)
    rate = float(np.percentile(prompts / np.maximum(observed.ttft_s, 1e-4), 80))
    quickest = max(float(observed.ttft_s.min()) * 0.1, 1e-4)
    start = {"prefill_rate": rate, "step_s": step * 0.1, "floor_s": step * 0.7, "decode_s": step * 0.1}
    start["context_s"] = step * 1e-5
    found: Floats = np.log(np.array([*(start[name] for name in _RATES), quickest]))
    return found


def nelder_mead(loss: Callable[[Floats], float], start: Floats, *, rounds: int, size: float = 0.5) -> Floats:
    """The best point found; `size` is that of the first simplex. Coefficients 1, 2, 1/2, 1/2."""
    simplex = [start, *(start + size * axis for axis in np.eye(start.size))]
    scored = sorted(((loss(point), number, point) for number, point in enumerate(simplex)), key=lambda one: one[:2])
    for number in range(len(scored), len(scored) + rounds):
        centre = np.mean([point for _, _, point in scored[:-1]], axis=0)
        worst = scored[-1]
        best_value, second = scored[0][0], scored[-2][0]
        point = centre + (centre - worst[2])
        value = loss(point)
        if value < best_value:
            further = centre + 2 * (centre - worst[2])
            beyond = loss(further)
            value, point = (beyond, further) if beyond < value else (value, point)
        elif value >= second:
            point = centre + 0.5 * ((point if value < worst[0] else worst[2]) - centre)
            value = loss(point)
            if value >= worst[0]:
                best = scored[0][2]
                shrunk = [best + 0.5 * (one - best) for _, _, one in scored[1:]]
                scored = [scored[0], *((loss(one), number + at, one) for at, one in enumerate(shrunk))]
                scored.sort(key=lambda one: one[:2])
                continue
        scored = sorted([*scored[:-1], (value, number, point)], key=lambda one: one[:2])
    found: Floats = scored[0][2]
    return found
