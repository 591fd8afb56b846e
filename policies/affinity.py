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

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from policies.decision import decide, settle
from policies.fleet_view import NUMBER, Column, FleetView, RouteRequest
from replicas.protocol import NoReplica, RouteDecision

# Replicas up to which they are scored one by one: below, a vector operation costs more than the numbers in it.
_FEW = 4

_RUNNING, _WAITING, _SENT = NUMBER["num_requests_running"], NUMBER["num_requests_waiting"], NUMBER["sent_requests"]
_QUEUED, _SENT_TOKENS = NUMBER["queued_tokens"], NUMBER["sent_tokens"]
_FREE, _SENT_BLOCKS = NUMBER["kv_blocks_free"], NUMBER["sent_blocks"]
_PREFILL_RATE, _RELEASE_RATE = NUMBER["prefill_rate"], NUMBER["block_release_rate"]
_STEP = NUMBER["decode_step_s"]
_TERMS = ("queue_ms", "blocks_ms", "prefill_ms", "decode_ms")

# What is computed of one replica, or of all of them at once.
_Number = TypeVar("_Number", float, Column)


def affinity(request: RouteRequest, view: FleetView, now: float, rng: random.Random) -> RouteDecision:
    """The eligible replica with the lowest cost; ties by lot. Raises NoReplica when none is eligible."""
    return (_one_by_one if len(view.replica_ids) <= _FEW else _all_at_once)(request, view, rng)


def _terms(
    request: RouteRequest,
    row: Sequence[_Number],
    cached: _Number,
    rates: tuple[_Number, _Number],
    mean_requests: float,
    larger: Callable[[_Number, float], _Number],
) -> tuple[_Number, _Number, _Number, _Number]:
    """(queue_ms, blocks_ms, prefill_ms, decode_ms) of a replica.

    cached: its prompt tokens there. rates: at which it computes prompts and gives back blocks.
    """
    ms_per_token, release_rate = 1e3 / rates[0], rates[1]
    queue = (row[_QUEUED] + row[_SENT_TOKENS]) * ms_per_token
    prefill = (request.prompt_tokens - cached) * ms_per_token
    # Until running sequences have returned what this request and those before it lack.
    new_blocks = request.num_blocks - cached // request.block_size
    ahead = row[_QUEUED] / request.block_size + row[_SENT_BLOCKS]
    blocks = larger(ahead + new_blocks - row[_FREE], 0.0) * 1e3 / release_rate
    # What running sequences add to a step: the replica's measured decode step, in proportion to its share of the load.
    # The measured step belongs to the batches of a while ago; an idle replica still remembers it, but has nobody to
    # wait for.
    requests = row[_RUNNING] + row[_WAITING] + row[_SENT]
    decode = row[_STEP] * requests * (1e3 / max(mean_requests, 1.0))
    return queue, blocks, prefill, decode


def _all_at_once(request: RouteRequest, view: FleetView, rng: random.Random) -> RouteDecision:
    eligible, queued = view.eligible, view.queued_tokens
    ready = np.count_nonzero(eligible)
    if not ready:
        raise NoReplica("no replica is ready")
    cached = view.cached_tokens(request)
    rates = (
        _known(view.columns[_PREFILL_RATE], eligible, unknown=1e3),
        _known(view.columns[_RELEASE_RATE], eligible, unknown=np.inf),
    )
    requests = view.requests
    terms = _terms(
        request,
        cast(Sequence[Column], view.columns),
        cast(Column, cached),
        rates,
        float(requests.sum()) / requests.size,
        np.maximum,
    )
    queue, blocks, prefill, decode = terms
    first_token = np.maximum(queue, blocks) + prefill + decode
    crowd = prefill * (np.count_nonzero(queued[eligible]) / ready)
    return decide(
        "affinity",
        request,
        view,
        rng,
        first_token + crowd,
        dict(zip((*_TERMS, "crowd_ms"), (*terms, crowd), strict=True)),
        cached=cached,
        predicted_ms=first_token,
    )


def _known(rates: Column, eligible: npt.NDArray[np.bool_], *, unknown: float) -> Column:
    """The rates, each that is not measured yet (0) taken for the mean of the others'; `unknown` if none is."""
    if np.count_nonzero(rates) == rates.size:
        return rates
    measured = rates > 0
    known = rates[measured & eligible]
    return np.where(measured, rates, known.mean() if known.size else unknown)


def _one_by_one(request: RouteRequest, view: FleetView, rng: random.Random) -> RouteDecision:
    """The same for a few replicas, several times as fast as vector operations."""
    open_to = [number for number, eligible in enumerate(view.eligible.tolist()) if eligible]
    if not open_to:
        raise NoReplica("no replica is ready")
    rows: list[list[float]] = view.columns.T.tolist()
    cached = view.cached_tokens_of_few(request)
    mean_requests = sum([row[_RUNNING] + row[_WAITING] + row[_SENT] for row in rows]) / len(rows)
    open_rows = [rows[number] for number in open_to]
    share = sum([row[_QUEUED] + row[_SENT_TOKENS] > 0 for row in open_rows]) / len(open_rows)
    scores, predicted, columns = [], [], []
    for number in open_to:
        row = rows[number]
        rates = (
            row[_PREFILL_RATE] or _mean_rate(open_rows, _PREFILL_RATE, unknown=1e3),
            row[_RELEASE_RATE] or _mean_rate(open_rows, _RELEASE_RATE, unknown=math.inf),
        )
        terms = _terms(request, row, float(cached[number]), rates, mean_requests, max)
        queue, blocks, prefill, decode = terms
        first_token = max(queue, blocks) + prefill + decode
        crowd = prefill * share
        scores.append(first_token + crowd)
        predicted.append(first_token)
        columns.append((*terms, crowd, first_token + crowd))
    lowest = min(scores)
    ties = [place for place, score in enumerate(scores) if score == lowest]
    best = ties[0] if len(ties) == 1 else rng.choice(ties)
    return settle(
        "affinity",
        request,
        view,
        open_to[best],
        candidates=tuple([view.replica_ids[number] for number in open_to]),
        terms=dict(zip((*_TERMS, "crowd_ms", "score"), zip(*columns, strict=True), strict=True)),
        held=cached[open_to[best]],
        predicted_ms=predicted[best],
    )


def _mean_rate(rows: list[list[float]], column: int, *, unknown: float) -> float:
    """What a rate that is not measured yet (0) is taken for."""
    measured = [row[column] for row in rows if row[column] > 0]
    return sum(measured) / len(measured) if measured else unknown
