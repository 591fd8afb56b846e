"""A model that made a run is found again from the run alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from policies.calibrate import fit, nelder_mead, observe, read_model
from policies.sim_fleet import Fleet
from policies.sim_replica import ReplicaModel
from policies.simulator import prepare, simulate
from policies.traces import TraceRequest

TRUTH = ReplicaModel(prefill_rate=600.0, step_s=0.002, floor_s=0.02, decode_s=0.005, context_s=2e-6)


def trace(count: int, rate: float, seed: int) -> list[TraceRequest]:
    rng = random.Random(seed)
    at, found = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        found.append(TraceRequest(at, rng.randrange(20, 400), rng.randrange(2, 60)))
    return found


def run_of(requests: list[TraceRequest], fleet: Fleet) -> dict[str, Any]:
    """What `signalbox load` would have written of it."""
    result = simulate(prepare(requests), "affinity", fleet).outcomes
    due = [request.arrival_s for request in requests]
    count = len(requests)
    return {
        "requests": {
            "index": list(range(count)),
            "scheduled": due,
            "first": (np.array(due) + result.column("ttft_s")).tolist(),
            "end": (np.array(due) + result.column("e2e_s")).tolist(),
            "error": [""] * count,
            "prompt_tokens": [request.prompt_tokens for request in requests],
            "completion_tokens": [request.output_tokens for request in requests],
            "cached_tokens": [0] * count,
        }
    }


def test_the_model_that_made_a_run_predicts_another_rate_after_calibration() -> None:
    truth = Fleet(replicas=2, model=TRUTH, gateway_s=0.004)
    found = fit(observe(run_of(trace(40, 3.0, 1), truth)), Fleet(replicas=2), rounds=120)
    assert found.ttft_error < 0.1
    other = prepare(trace(60, 5.0, 2))
    real = simulate(other, "affinity", truth)
    told = simulate(other, "affinity", Fleet(replicas=2, model=found.model, gateway_s=found.gateway_s))
    for percentile in (50, 95):
        assert told.ttft(percentile) == pytest.approx(real.ttft(percentile), rel=0.12)
    assert told.throughput == pytest.approx(real.throughput, rel=0.15)
    model, gateway_s = read_model(found.as_json())
    assert (model, gateway_s) == (found.model, found.gateway_s)


def test_the_minimum_of_a_bent_valley_is_found() -> None:
    best = nelder_mead(lambda p: float(100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2), np.zeros(2), rounds=200)
    assert best == pytest.approx([1.0, 1.0], abs=0.02)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"requests": None}, "no requests"),
        ({"requests": {}}, "no requests"),
    ],
)
def test_a_file_that_is_no_run_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        observe(change)


def test_too_few_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        observe(run_of(trace(10, 1.0, 0), Fleet()))


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "schema"),
        ({"schema": "signalbox.replica/1"}, "replica is missing"),
        ({"schema": "signalbox.replica/1", "replica": {"speed": 1}}, "speed"),
        ({"schema": "signalbox.replica/1", "replica": {"step_s": "fast"}}, "step_s must be a number"),
        ({"schema": "signalbox.replica/1", "replica": {"prefill_rate": 0}}, "positive"),
    ],
)
def test_a_broken_model_is_refused(document: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_model(document)
