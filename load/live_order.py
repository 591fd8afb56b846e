"""Whether policies that run for real come in the order that the simulator gives them.

Latencies of the two are not the same numbers (another engine, sockets, a shared machine); their order is the claim. Two
policies that the simulator itself puts within `CLEAR` of each other, or one way round with one seed and the other way
with another (ties are broken by lot, and a p95 of a minute shows it), have no order to be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

OURS = "affinity"
CACHE_BLIND = frozenset(("round_robin", "least_load", "power_of_two"))
CLEAR = 0.10


@dataclass(frozen=True, slots=True)
class Figures:
    """What orders policies. Seconds; share of prompt tokens that were cached."""

    policy: str
    ttft_p95_s: float
    hit_rate: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """One figure's order, best first. contradicted: pairs (better, worse) by the simulator whose live order is the
    other; compared: how many pairs it tells apart by more than CLEAR, with every seed the same way."""

    figure: str
    live: tuple[str, ...]
    simulated: tuple[str, ...]
    compared: int
    contradicted: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Claim:
    what: str
    live: bool
    simulated: bool | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """rankings are empty where there is no simulation to compare with."""

    rankings: tuple[Ranking, ...]
    claims: tuple[Claim, ...]

    @property
    def agrees(self) -> bool:
        """Every claim holds wherever it was looked at, and no clear pair stands the other way round."""
        claims = all(claim.live and claim.simulated is not False for claim in self.claims)
        return claims and not any(ranking.contradicted for ranking in self.rankings)


def mean(runs: Sequence[Sequence[Figures]]) -> tuple[Figures, ...]:
    """Of each policy that all runs have, in the first one's order."""
    found = []
    for first in runs[0]:
        own = [one for run in runs for one in run if one.policy == first.policy]
        if len(own) == len(runs):
            ttft, rate = (
                sum(values) / len(runs) for values in zip(*((o.ttft_p95_s, o.hit_rate) for o in own), strict=True)
            )
            found.append(Figures(first.policy, ttft, rate))
    return tuple(found)


def judge(live: Sequence[Figures], *runs: Sequence[Figures]) -> Verdict:
    """runs: the simulator's, one for each seed. Over the policies that all have; of the live ones alone without any."""
    simulated = mean(runs) if runs else ()
    names = {one.policy for one in live}
    if simulated:
        names &= {one.policy for one in simulated}
    live = [one for one in live if one.policy in names]
    simulated = tuple(one for one in simulated if one.policy in names)
    rankings: tuple[Ranking, ...] = ()
    if simulated:
        rankings = (_ranking("p95 TTFT", live, simulated, runs), _ranking("token hit rate", live, simulated, runs))
    return Verdict(rankings, tuple(_claims(live, simulated)))


def _badness(figure: str, one: Figures) -> float:
    """Lower is better, and positive ratios mean what they say."""
    return one.ttft_p95_s if figure == "p95 TTFT" else 1 / max(one.hit_rate, 1e-9)


def _ordered(figure: str, rows: Sequence[Figures]) -> tuple[str, ...]:
    return tuple(one.policy for one in sorted(rows, key=lambda one: _badness(figure, one)))


def _ranking(
    figure: str, live: Sequence[Figures], simulated: Sequence[Figures], runs: Sequence[Sequence[Figures]]
) -> Ranking:
    mine, theirs, *each = ({one.policy: _badness(figure, one) for one in rows} for rows in (live, simulated, *runs))
    order = _ordered(figure, simulated)
    clear = [
        (a, b)
        for a, b in combinations(order, 2)
        if theirs[b] > theirs[a] * (1 + CLEAR) and all(seed[b] > seed[a] for seed in each)
    ]
    return Ranking(
        figure=figure,
        live=_ordered(figure, live),
        simulated=order,
        compared=len(clear),
        contradicted=tuple((a, b) for a, b in clear if not mine[a] < mine[b]),
    )


def _claims(live: Sequence[Figures], simulated: Sequence[Figures]) -> list[Claim]:
    names = {one.policy for one in live}
    found = []
    if OURS in names and len(names) > 1:
        found += [
            Claim(
                f"{OURS} has the best {figure}",
                _ordered(figure, live)[0] == OURS,
                _ordered(figure, simulated)[0] == OURS if simulated else None,
            )
            for figure in ("p95 TTFT", "token hit rate")
        ]
    blind = names & CACHE_BLIND
    if blind and blind != names:
        what = f"{', '.join(sorted(blind))} {'have' if len(blind) > 1 else 'has'} the worst token hit rate"
        found.append(Claim(what, _blind_worst(live), _blind_worst(simulated) if simulated else None))
    return found


def _blind_worst(rows: Sequence[Figures]) -> bool:
    blind = [one.hit_rate for one in rows if one.policy in CACHE_BLIND]
    return max(blind) < min(one.hit_rate for one in rows if one.policy not in CACHE_BLIND)
