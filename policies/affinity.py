"""Chooses the replica that costs the fewest milliseconds: queue, cache and batch in one currency.

    ms = max(queued_tokens / prefill_rate, blocks_short / block_release_rate)      queue_ms, blocks_ms
         + uncached_tokens / prefill_rate                                          prefill_ms
         + what running sequences add to a step                                    decode_ms
         + prefill_ms * share of the replicas at which somebody queues             crowd_ms

The first four are this request's expected time to its first token. The last is what its work costs those behind it:
where a prompt always waits, a token that a cache would have saved is paid for twice. It is never more than prefill_ms,
so no prefix is worth more than two computations of it, and a hot one spreads.

Rates are what each replica measures of itself. Session stickiness and the spreading of hot prefixes need no mechanism
of their own: a cached prefix makes a replica cheap, and a queue longer than the prefix is worth makes it dear.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from policies.decision import decide
from policies.fleet_view import Column, FleetView, RouteRequest
from replicas.protocol import NoReplica, RouteDecision


def affinity(request: RouteRequest, view: FleetView, now: float, rng: random.Random) -> RouteDecision:
    """The eligible replica with the lowest cost; ties by lot. Raises NoReplica when none is eligible."""
    eligible = view.eligible
    ready = np.count_nonzero(eligible)
    if not ready:
        raise NoReplica("no replica is ready")
    cached = view.cached_tokens(request)
    new_blocks = request.num_blocks - cached // request.block_size
    queued = view.queued_tokens
    ms_per_token = 1e3 / _known(view.column("prefill_rate"), eligible, unknown=1e3)
    queue = queued * ms_per_token
    prefill = (request.prompt_tokens - cached) * ms_per_token
    blocks = _wait_for_blocks(request, view, new_blocks)
    decode = _decode_penalty(view)
    first_token = np.maximum(queue, blocks) + prefill + decode
    crowd = prefill * (np.count_nonzero(queued[eligible]) / ready)
    return decide(
        "affinity",
        request,
        view,
        rng,
        first_token + crowd,
        {"queue_ms": queue, "blocks_ms": blocks, "prefill_ms": prefill, "decode_ms": decode, "crowd_ms": crowd},
        cached=cached,
        predicted_ms=first_token,
    )


def _wait_for_blocks(request: RouteRequest, view: FleetView, new_blocks: npt.NDArray[np.int64]) -> Column:
    """Until running sequences have returned what this request and those before it lack; 0 while no rate is known."""
    ahead = view.column("queued_tokens") / request.block_size + view.column("sent_blocks")
    short: Column = np.maximum(ahead + new_blocks - view.column("kv_blocks_free"), 0.0)
    if not np.count_nonzero(short):
        return short
    return short * 1e3 / _known(view.column("block_release_rate"), view.eligible, unknown=np.inf)


def _decode_penalty(view: FleetView) -> Column:
    """What running sequences add to a step: the replica's measured decode step, in proportion to its share of the load.

    The measured step belongs to the batches of a while ago; an idle replica still remembers it, but has nobody to wait
    for.
    """
    requests = view.requests
    mean = max(float(requests.sum()) / requests.size, 1.0)
    penalty: Column = view.column("decode_step_s") * requests * (1e3 / mean)
    return penalty


def _known(rates: Column, eligible: npt.NDArray[np.bool_], *, unknown: float) -> Column:
    """The rates, each that is not measured yet (0) taken for the mean of the others'; `unknown` if none is."""
    if np.count_nonzero(rates) == rates.size:
        return rates
    measured = rates > 0
    known = rates[measured & eligible]
    return np.where(measured, rates, known.mean() if known.size else unknown)
