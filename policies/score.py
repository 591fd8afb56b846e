"""A prediction held against what happened: a canary's keys beside all others, from recorded traffic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.replay import Change, compare, per_request
from policies.sim_outcome import BLOCKED, COMPLETED, CUT, LIMITED, UNAVAILABLE, Floats
from policies.traffic import Recorded


def measured(recorded: Sequence[Recorded]) -> dict[str, Floats]:
    """Recorded traffic in the columns of a simulation's outcomes: what really happened."""
    start = recorded[0].at if recorded else 0.0
    ends = [_end_of(one) for one in recorded]
    columns: dict[str, Any] = {
        "arrived": [one.at - start for one in recorded],
        "ttft_s": [math.nan if one.ttft_s is None else one.ttft_s for one in recorded],
        "e2e_s": [math.nan if one.e2e_s is None else one.e2e_s for one in recorded],
        "cost": [one.cost for one in recorded],
        "ends": ends,
        "prompt_tokens": [one.request.prompt_tokens for one in recorded],
        "cached_tokens": [one.cached_tokens for one in recorded],
    }
    return {name: np.array(values, np.float64) for name, values in columns.items()}


def _end_of(one: Recorded) -> int:
    if one.status == 429:
        return BLOCKED if one.failure == "BudgetExceeded" else LIMITED
    if 200 <= one.status < 300:
        return COMPLETED
    return UNAVAILABLE if one.status == 503 else CUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One predicted change beside what was measured: the canary's keys against all others at the same time.

    held: the prediction lies within the measured interval, or where there is none within 15 % or points of it.
    """

    name: str
    predicted: float
    measured: Change
    held: bool


def score(predicted: Mapping[str, float | None], canary: Sequence[Recorded], others: Sequence[Recorded]) -> list[Score]:
    """Of every predicted change. Costs are compared a request, since the shares differ. ValueError without traffic."""
    if not canary or not others:
        raise ValueError(f"{len(canary)} requests of the canary and {len(others)} of others are nothing to compare")
    changes = compare(per_request(measured(others)), per_request(measured(canary)), paired=False)
    found = []
    for change in changes:
        told = predicted.get(change.name)
        if told is None or math.isnan(change.value):
            continue
        sure = not math.isnan(change.low)
        held = change.low - 1e-9 <= told <= change.high + 1e-9 if sure else abs(told - change.value) <= 0.15
        found.append(Score(name=change.name, predicted=told, measured=change, held=held))
    return found
