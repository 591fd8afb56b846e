"""Other routers' algorithms under the same signature, to be compared with on equal terms, and the table of all names.

Each is what its project does by default, on the numbers it would have; none of them knows the replicas' caches.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from policies.affinity import affinity
from policies.decision import decide
from policies.fleet_view import FleetView, RouteRequest
from replicas.protocol import NoReplica, RouteDecision

Policy = Callable[[RouteRequest, FleetView, float, random.Random], RouteDecision]

# SGLang's defaults: cache_threshold, balance_abs_threshold, balance_rel_threshold.
_MATCHED_SHARE, _IMBALANCE, _IMBALANCE_RATIO = 0.3, 64, 1.5


def round_robin(request: RouteRequest, view: FleetView, now: float, rng: random.Random) -> RouteDecision:
    """Every eligible replica in its turn."""
    score = np.ones(len(view.replica_ids))
    eligible = np.flatnonzero(view.eligible)
    if eligible.size:
        score[eligible[view.turn % eligible.size]] = 0
    return decide("round_robin", request, view, rng, score, {})


def least_load(request: RouteRequest, view: FleetView, now: float, rng: random.Random) -> RouteDecision:
    """Fewest requests running, waiting and sent; ties by lot."""
    return decide("least_load", request, view, rng, view.requests, {})


def power_of_two(request: RouteRequest, view: FleetView, now: float, rng: random.Random) -> RouteDecision:
    """The less loaded of two replicas drawn by lot (Mitzenmacher, IEEE TPDS 2001)."""
    eligible = np.flatnonzero(view.eligible).tolist()
    if not eligible:
        raise NoReplica("no replica is ready")
    drawn = rng.sample(eligible, min(2, len(eligible)))
    score = np.full(len(view.replica_ids), np.inf)
    score[drawn] = view.requests[drawn]
    return decide("power_of_two", request, view, rng, score, {})


def cache_aware(request: RouteRequest, view: FleetView, now: float, rng: random.Random) -> RouteDecision:
    """SGLang's router: balance when loads are far apart, else follow a prefix tree of what was sent where.

    Far apart: max - min > 64 and max > 1.5 min requests in flight; the least loaded then. Otherwise the replica with
    the longest match if that is more than 0.3 of the prompt, and if not the one with the smallest tree.
    """
    assert view.history is not None, "cache_aware needs a history of what was sent where"
    load = view.column("in_flight")
    matched = view.cached_tokens(request, view.history)
    sizes = view.history.sizes(view.replica_ids)
    terms = {
        "in_flight": load,
        "matched_tokens": matched.astype(np.float64),
        "tree_blocks": sizes.astype(np.float64),
    }
    loads = load[view.eligible]
    if loads.size and loads.max() - loads.min() > _IMBALANCE and loads.max() > _IMBALANCE_RATIO * loads.min():
        score = load
    elif (matched * view.eligible).max(initial=0) > _MATCHED_SHARE * request.prompt_tokens:
        score = -terms["matched_tokens"]
    else:
        score = terms["tree_blocks"]
    return decide("cache_aware", request, view, rng, score, terms, cached=matched)


POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "least_load": least_load,
    "power_of_two": power_of_two,
    "cache_aware": cache_aware,
    "affinity": affinity,
}
