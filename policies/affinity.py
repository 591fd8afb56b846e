"""Chooses the replica that costs a request the fewest milliseconds: queue, cache and batch in one currency.

    ms = max(queued_tokens / prefill_rate, blocks_short / block_release_rate)
         + uncached_tokens / prefill_rate
         + decode_penalty

Rates are what each replica measures of itself. Session stickiness and the spreading of hot prefixes need no mechanism
of their own: a cached prefix makes a replica cheap, and a queue longer than the prefix is worth makes it dear.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from policies.decision import decide
from policies.fleet_view import Column, FleetView, RouteRequest
from replicas.protocol import RouteDecision


def affinity(request: RouteRequest, view: FleetView, now: float, rng: random.Random) -> RouteDecision:
    """The eligible replica with the lowest cost; ties by lot. Raises NoReplica when none is eligible."""
    cached = view.cached_tokens(request)
    uncached = request.prompt_tokens - cached
    new_blocks = request.num_blocks - cached // request.block_size
    ms_per_token = 1e3 / _known(view.column("prefill_rate"), view.eligible, unknown=1e3)
    queue = view.queued_tokens * ms_per_token
    ahead = view.column("queued_tokens") / request.block_size + view.column("sent_blocks")
    short = np.maximum(ahead + new_blocks - view.column("kv_blocks_free"), 0.0)
    release = short * 1e3 / _known(view.column("block_release_rate"), view.eligible, unknown=np.inf)
    prefill = uncached * ms_per_token
    decode = _decode_penalty(view)
    return decide(
        "affinity",
        request,
        view,
        rng,
        np.maximum(queue, release) + prefill + decode,
        {"queue_ms": queue, "blocks_ms": release, "prefill_ms": prefill, "decode_ms": decode},
        cached=cached,
        predicts=True,
    )


def _decode_penalty(view: FleetView) -> Column:
    """A first token waits at least one step, which the running sequences lengthen: their measured decode step."""
    penalty: Column = view.column("decode_step_s") * 1e3
    return penalty


def _known(rates: Column, eligible: npt.NDArray[np.bool_], *, unknown: float) -> Column:
    """The rates, each that is not measured yet (0) taken for the mean of the others'; `unknown` if none is."""
    measured = rates > 0
    if measured.all():
        return rates
    known = rates[measured & eligible]
    return np.where(measured, rates, known.mean() if known.size else unknown)
