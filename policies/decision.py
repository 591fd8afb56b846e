"""From scores to a RouteDecision: what every policy's last line does."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from policies.fleet_view import Column, FleetView, RouteRequest
from policies.prefix_index import Counts
from replicas.protocol import NoReplica, RouteDecision


def decide(
    policy: str,
    request: RouteRequest,
    view: FleetView,
    rng: random.Random,
    score: Column,
    terms: Mapping[str, Column],
    *,
    cached: Counts | None = None,
    predicted_ms: Column | None = None,
) -> RouteDecision:
    """The eligible replica with the lowest score; ties by lot. Raises NoReplica when none is eligible.

    A replica that is not eligible or has an infinite score is no candidate and does not appear in the decision.
    cached: prompt tokens each replica holds, where the policy asked. predicted_ms: to a first token, where it says.
    """
    ready = np.count_nonzero(view.eligible)
    if not ready:
        raise NoReplica("no replica is ready")
    allowed = score if ready == score.size else np.where(view.eligible, score, np.inf)
    best = int(allowed.argmin())
    lowest = allowed == allowed[best]
    if np.count_nonzero(lowest) > 1:
        best = rng.choice(np.flatnonzero(lowest).tolist())
    columns = {**terms, "score": allowed}
    if allowed.max() < np.inf:
        candidates, kept = view.replica_ids, {name: _packed(column) for name, column in columns.items()}
    else:
        open_to = np.flatnonzero(np.isfinite(allowed))
        candidates = tuple(view.replica_ids[number] for number in open_to)
        kept = {name: _packed(column[open_to]) for name, column in columns.items()}
    return settle(
        policy,
        request,
        view,
        best,
        candidates=candidates,
        terms=kept,
        held=0 if cached is None else int(cached[best]),
        predicted_ms=None if predicted_ms is None else float(predicted_ms[best]),
    )


def settle(
    policy: str,
    request: RouteRequest,
    view: FleetView,
    best: int,
    *,
    candidates: tuple[str, ...],
    terms: Mapping[str, Sequence[float]],
    held: int,
    predicted_ms: float | None,
) -> RouteDecision:
    """For the replica that is number `best` of the view and holds that many of the prompt's tokens."""
    return RouteDecision(
        policy=policy,
        replica_id=view.replica_ids[best],
        candidates=candidates,
        terms=terms,
        generation=view.generation,
        uncached_tokens=request.prompt_tokens - held,
        new_blocks=request.num_blocks - held // request.block_size,
        predicted_ms=predicted_ms,
    )


def _packed(column: Column) -> array[float]:
    """A copy as eight bytes a number: a list of floats would take four times as long to make, and to keep."""
    return array("d", column.tobytes())
