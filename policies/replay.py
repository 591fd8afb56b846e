"""What a candidate generation would change: both it and the one that serves, simulated on the same recorded traffic.

    found = replay(recorded, world, serving, candidate)
    found.change("cost").value          # 0.12: twelve per cent dearer

Both runs see the same requests at the same times with the same seed, so their difference is the policy's. Its interval
(95 %) is a paired block bootstrap: the traffic is cut into equal stretches of time, stretches are drawn with
replacement, and both runs' figures are computed from the same draws. Requests near in time depend on each other,
stretches hardly do (Künsch, Annals of Statistics 1989). Fewer than eight stretches give no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.canary import DEFAULT_SALT
from policies.sim_outcome import BLOCKED, COMPLETED, CUT, LIMITED, TOO_LONG, UNAVAILABLE, Floats, Outcomes
from policies.sim_rules import Ask, Canary, SimRules, World, simulate_rules
from policies.simulator import prepare
from policies.traffic import Recorded

PICO = 10**12
_DRAWS = 400
# Sections of the document that change nothing here.
_UNSEEN = ("priorities", "admission", "retries", "hedging")
_LEAST_STRETCHES, _MOST_STRETCHES = 8, 40

Columns = Mapping[str, Floats]
Index = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of a run. relative: its change is told in per cent of what it was, else in percentage points."""

    name: str
    of: Callable[[Columns], float]
    relative: bool
    unit: str


def _percentile(column: str, rank: float) -> Callable[[Columns], float]:
    def of(columns: Columns) -> float:
        values = columns[column]
        known = values[~np.isnan(values)]
        return float(np.percentile(known, rank)) if known.size else math.nan

    return of


def _share(ends: Sequence[int]) -> Callable[[Columns], float]:
    return lambda columns: float(np.isin(columns["ends"], ends).mean()) if columns["ends"].size else math.nan


def _hit_rate(columns: Columns) -> float:
    good = columns["ends"] == COMPLETED
    asked = columns["prompt_tokens"][good].sum()
    return float(columns["cached_tokens"][good].sum() / asked) if asked else math.nan


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("cost", lambda columns: float(columns["cost"].sum() / PICO), True, "USD"),
        Figure("ttft_p50", _percentile("ttft_s", 50), True, "s"),
        Figure("ttft_p95", _percentile("ttft_s", 95), True, "s"),
        Figure("e2e_p95", _percentile("e2e_s", 95), True, "s"),
        Figure("hit_rate", _hit_rate, False, ""),
        Figure("rejects", _share((UNAVAILABLE, LIMITED, TOO_LONG, CUT)), False, ""),
        Figure("budget_blocks", _share((BLOCKED,)), False, ""),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """before, after: of the generation that serves and of the candidate. value: (after - before) / before where the
    figure is relative, else the difference; low, high: its interval, NaN where there is none."""

    name: str
    before: float
    after: float
    value: float
    low: float
    high: float

    @property
    def relative(self) -> bool:
        return FIGURES[self.name].relative

    def as_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("before", "after", "value", "low", "high")}
        return {name: None if math.isnan(value) else value for name, value in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """changes: the candidate for everybody against what serves. split: a canary's keys against all others, in a run in
    which it serves only them; empty without a canary. notes: what the simulation could not know, in sentences.
    """

    requests: int
    span_s: float
    changes: tuple[Change, ...]
    split: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    def change(self, name: str) -> Change:
        return next(one for one in self.changes if one.name == name)

    def as_json(self) -> dict[str, Any]:
        changes = {one.name: one.as_json() for one in self.changes}
        return {"requests": self.requests, "span_s": self.span_s, "changes": changes, "notes": list(self.notes)}


def replay(
    recorded: Sequence[Recorded],
    world: World,
    serving: SimRules,
    candidate: SimRules,
    *,
    share: float = 1.0,
    seed: int = 0,
) -> Replay:
    """Both generations for everybody; with a share below 1 also the candidate for so many keys. ValueError without
    traffic.
    """
    if not recorded:
        raise ValueError("no traffic was recorded")
    block_size = min(model.fleet.model.block_size for model in world.models)
    asks, notes = asks_of(recorded, block_size)
    epoch = recorded[0].at
    runs = [simulate_rules(asks, world, rules, epoch=epoch, seed=seed) for rules in (serving, candidate)]
    before, after = (columns_of(outcomes) for outcomes in runs)
    split: list[Change] = []
    if share < 1:
        document = candidate.document
        salt = document.canary.salt if document.canary else DEFAULT_SALT
        canary = Canary(candidate, share, salt)
        whole = columns_of(simulate_rules(asks, world, serving, canary=canary, epoch=epoch, seed=seed))
        theirs = whole["generation"] == candidate.generation
        if theirs.any() and not theirs.all():
            split = compare(*(per_request(_rows(whole, np.flatnonzero(of))) for of in (~theirs, theirs)), paired=False)
    unknown = sum(1 for ask in asks if not ask.quality)
    if unknown and any(group.trade for rules in (serving, candidate) for group in rules.groups.values()):
        notes = (*notes, f"{unknown} requests have no recorded prediction: the rule of thumb chose their model")
    stated = {name for rules in (serving, candidate) for name in _UNSEEN if getattr(rules.document, name)}
    stated |= {"sessions" for rules in (serving, candidate) for group in rules.groups.values() if group.keep_s}
    if stated:
        notes = (*notes, f"not simulated: what the policies say of {', '.join(sorted(stated))}")
    return Replay(
        requests=len(asks),
        span_s=asks[-1].arrival_s,
        changes=tuple(compare(before, after)),
        split=tuple(split),
        notes=notes,
    )


def asks_of(recorded: Sequence[Recorded], block_size: int = 16) -> tuple[list[Ask], tuple[str, ...]]:
    """Recorded traffic as requests of a simulation, from time 0, and what had to be assumed.

    Of a request that was refused the answer's length is not known: it gets the median of those for the same name.
    """
    answered = [one for one in recorded if one.request.output_tokens]
    medians: dict[str, int] = {}
    for name in {one.asked for one in recorded}:
        lengths = [one.request.output_tokens for one in answered if one.asked == name]
        medians[name] = int(np.median(lengths)) if lengths else 0
    overall = int(np.median([one.request.output_tokens for one in answered])) if answered else 1
    start, guessed, asks = recorded[0].at, 0, []
    for one, plain in zip(recorded, prepare([one.request for one in recorded], block_size), strict=True):
        output = plain.output_tokens
        if not output:
            guessed += 1
            output = medians[one.asked] or overall
            output = min(output, one.max_tokens) if one.max_tokens else output
        asks.append(
            Ask(
                one.at - start,
                max(1, plain.prompt_tokens),
                max(1, output),
                plain.hashes,
                plain.root,
                max(one.max_tokens, output),
                key_id=one.key_id,
                key=one.key,
                team=one.team,
                asked=one.asked,
                quality=one.quality,
            )
        )
    notes = (f"{guessed} requests brought no answer: theirs are taken to be as long as others'",) if guessed else ()
    return asks, notes


def columns_of(outcomes: Outcomes) -> dict[str, Floats]:
    names = ("arrived", "ttft_s", "e2e_s", "cost", "ends", "prompt_tokens", "cached_tokens", "generation", "model")
    return {name: outcomes.column(name) for name in names}


def compare(before: Columns, after: Columns, *, paired: bool = True, seed: int = 0) -> list[Change]:
    """Every figure's change and its interval.

    paired: both are of the same requests, so a draw takes the same ones of both; else each has stretches of its own.
    """
    draws = _draws(before, seed), _draws(after, seed if paired else seed + 1)
    found = []
    for figure in FIGURES.values():
        values = [figure.of(before), figure.of(after)]
        low = high = math.nan
        if draws[0] and draws[1]:
            drawn = [
                _change(figure, figure.of(_rows(before, one)), figure.of(_rows(after, other)))
                for one, other in zip(*draws, strict=True)
            ]
            known = [value for value in drawn if not math.isnan(value)]
            if len(known) > _DRAWS // 2:
                low, high = (float(edge) for edge in np.percentile(known, (2.5, 97.5)))
        change = _change(figure, *values)
        found.append(Change(name=figure.name, before=values[0], after=values[1], value=change, low=low, high=high))
    return found


def _change(figure: Figure, before: float, after: float) -> float:
    if not figure.relative:
        return after - before
    if before == after:
        return 0.0
    return (after - before) / before if before else math.nan


def _draws(columns: Columns, seed: int) -> list[Index]:
    """Rows of every draw of the bootstrap; none where the traffic has too few stretches."""
    arrived = columns["arrived"]
    stretches = min(_MOST_STRETCHES, arrived.size // 10)
    if stretches < _LEAST_STRETCHES or arrived[-1] <= arrived[0]:
        return []
    edges = np.linspace(arrived[0], np.nextafter(arrived[-1], np.inf), stretches + 1)
    parts = [np.arange(*np.searchsorted(arrived, edges[at : at + 2])) for at in range(stretches)]
    rng = np.random.default_rng(seed)
    return [
        np.concatenate([parts[at] for at in rng.integers(0, stretches, stretches)]).astype(np.int64)
        for _ in range(_DRAWS)
    ]


def per_request(columns: Columns) -> Columns:
    """With costs divided by the number of requests, so that parts of different sizes can be compared."""
    return {**columns, "cost": columns["cost"] / max(1, columns["cost"].size)}


def _rows(columns: Columns, rows: Index) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def spell(change: Change) -> str:
    """`+12.0% (3.1% .. 19.4%)`; percentage points where the figure is a share."""
    unit = "%" if change.relative else " points"
    if math.isnan(change.value):
        return "not known"
    interval = "" if math.isnan(change.low) else f" ({change.low * 100:+.1f} .. {change.high * 100:+.1f})"
    return f"{change.value * 100:+.1f}{unit}{interval}"
