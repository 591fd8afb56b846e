"""From a run's records to its figures: a JSON document of one run. Nothing here draws or prints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from load import stats
from load.execute import Collected
from load.plan import ClosedLoop, Plan
from load.record import KINDS, REJECTED, Record
from load.scrape import grown
from load.slo import Objective
from load.stats import Estimate, Floats
from load.table import Gaps, Table, gaps_of, table_of

METRICS = ("ttft", "tpot", "itl", "chunk_gap", "e2e", "queue", "ttft_sent", "e2e_sent")
RANKS = (50.0, 90.0, 95.0, 99.0, 99.9)

# The rule by which a run is about the generator and not about the server.
LAG_LIMIT_S = 0.010
LAG_SHARE = 0.05
STALL_SHARE = 0.02
LAG_RULE = (
    f"p99 of the send lag above {LAG_LIMIT_S * 1e3:.0f} ms and above {LAG_SHARE:.0%} of the median time from sending "
    "to the first token (to the end, if answers come in one piece); or a worker that stood still, unable to send or to "
    f"read, for more than {STALL_SHARE:.0%} of the run"
)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prices:
    """USD per million tokens; cached input costs as input where it is not given."""

    input: float = 0.0
    output: float = 0.0
    cached: float | None = None

    @property
    def given(self) -> bool:
        return bool(self.input or self.output or self.cached)


@dataclass(frozen=True, slots=True)
class Judging:
    """How a run is judged. warmup: "auto" (MSER-5), "none", or seconds."""

    objectives: tuple[Objective, ...] = ()
    prices: Prices = Prices()
    warmup: str | float = "auto"
    count: Callable[[str], int] | None = None  # a tokenizer's count of an answer's text


def summarise(plan: Plan, collected: Collected, judging: Judging, label: str) -> Json:
    """The figures of one run; see docs/load.md for the schema."""
    table = table_of(collected.records, collected.start)
    warmup = _warmup(table, judging.warmup, plan.target.stream)
    begin = warmup["cut_s"]
    measured = table.scheduled >= begin
    part = table.rows(measured)
    records = [record for record, kept in zip(collected.records, measured, strict=True) if kept]
    done = part.rows(part.ok)
    gaps = gaps_of([record for record in records if not record.error])
    end = _window_end(part, collected.load_end - collected.start, begin)
    count_from = _count_from(plan, done, begin, end)
    run: Json = {
        "label": label,
        "stopped": collected.stopped,
        "interrupted": collected.interrupted,
        "started_unix": collected.wall,
        "window": {"begin_s": begin, "end_s": end, "rates_begin_s": count_from, "warmup": warmup},
        "generator": _generator(part, collected, plan),
        "counts": {"all": counts(table), "measured": counts(part)},
        "failures": _failures(collected.records),
        "latency": {metric: _distribution(_values(done, gaps, metric)) for metric in METRICS},
        "rates": _rates(plan, table, collected, count_from, end),
        "tokens": _tokens(done, collected),
        "checks": checks(table.rows(table.ok), [one for one in collected.records if not one.error], judging.count),
        "cost": _cost(done, judging.prices),
        "slo": _slo(part, done, gaps, judging.objectives, count_from, end),
        "timeline": _timeline(table, end),
        "server": [asdict(series) for series in collected.server],
    }
    run["requests"] = _columns(table)
    return run


def _values(done: Table, gaps: Gaps, metric: str) -> Floats:
    values = gaps.of(metric)[0] if metric in ("itl", "chunk_gap") else done.column(metric)
    return values[~np.isnan(values)]


def _distribution(values: Floats) -> Json | None:
    """None where nothing of the kind was measured."""
    if values.size == 0:
        return None
    found: Json = {"count": int(values.size), "min": float(values.min()), "max": float(values.max())}
    found["mean"] = stats.mean(values).as_json()
    for rank in RANKS:
        found[f"p{rank:g}"] = stats.percentile(values, rank).as_json()
    found["cdf"] = np.percentile(values, np.linspace(0, 100, 201)).round(7).tolist()
    return found


def _warmup(table: Table, rule: str | float, stream: bool) -> Json:
    if not isinstance(rule, str):
        return {"rule": f"the first {rule:g} s", "cut_s": rule, "settled": True, "cut": _before(table, rule)}
    if rule == "none" or not len(table):
        return {"rule": "none", "cut_s": 0.0, "settled": True, "cut": 0}
    metric = "ttft" if stream else "e2e"
    done = table.rows(table.ok)
    values = done.column(metric)
    known = ~np.isnan(values)
    cut = stats.warmup_count(values[known])
    when = float(done.scheduled[known][cut]) if cut else 0.0
    text = f"MSER-5 on {metric}"
    return {"rule": text, "cut_s": when, "settled": cut is not None, "cut": _before(table, when)}


def _before(table: Table, moment: float) -> int:
    return int((table.scheduled < moment).sum())


def _window_end(part: Table, load_end: float, begin: float) -> float:
    """Rates are counted up to the end of the load; if fewer than half of the answers came by then, up to the last."""
    ends = part.end[part.ok]
    if ends.size and (load_end <= begin or (ends <= load_end).sum() * 2 < ends.size):
        return float(ends.max())
    return max(load_end, begin)


def _generator(part: Table, collected: Collected, plan: Plan) -> Json:
    lag = part.column("lag")
    lag = lag[~np.isnan(lag)]
    done = part.rows(part.ok)
    answer = done.column("ttft_sent" if plan.target.stream else "e2e_sent")
    answer = answer[~np.isnan(answer)]
    p99 = float(np.percentile(lag, 99)) if lag.size else 0.0
    limit = max(LAG_LIMIT_S, LAG_SHARE * float(np.median(answer))) if answer.size else LAG_LIMIT_S
    stalled = max((end.stalled / end.lasted for end in collected.ends if end.lasted), default=0.0)
    return {
        "kept_up": p99 <= limit and stalled <= STALL_SHARE,
        "stalled_share": stalled,
        "longest_stall_s": max((end.longest for end in collected.ends), default=0.0),
        "rule": LAG_RULE,
        "limit_s": limit,
        "lag": {
            "mean": float(lag.mean()) if lag.size else 0.0,
            "p50": float(np.percentile(lag, 50)) if lag.size else 0.0,
            "p99": p99,
            "max": float(lag.max()) if lag.size else 0.0,
        },
        "workers": plan.workers,
        "busy": [round(end.busy, 4) for end in sorted(collected.ends, key=lambda end: end.worker)],
        "connections": sum(end.opened for end in collected.ends),
        "repeated_on_new_connection": sum(end.repeated for end in collected.ends),
    }


def counts(table: Table) -> Json:
    """Requests by how they ended; `sent` is all of them."""
    kinds = Counter(table.error.tolist())
    statuses = Counter(table.status.tolist())
    return {
        "sent": len(table),
        "completed": kinds[""],
        **{kind: kinds[kind] for kind in KINDS},
        "failed": len(table) - kinds[""] - kinds[REJECTED],
        "statuses": {str(status) if status else "none": number for status, number in sorted(statuses.items())},
    }


def _failures(records: Sequence[Record]) -> list[Json]:
    """The commonest messages of each kind."""
    found = Counter((record.error, record.detail) for record in records if record.error)
    return [{"kind": kind, "detail": text, "count": number} for (kind, text), number in found.most_common(20)]


def _count_from(plan: Plan, done: Table, begin: float, end: float) -> float:
    """Where counting begins for rates: in an open loop the median E2E after its start, when answers come as fast as
    requests do; otherwise with the window.
    """
    if isinstance(plan.arrivals, ClosedLoop) or not len(done):
        return begin
    filled = float(np.median(done.column("e2e")))
    return max(begin, filled) if filled < (end - begin) / 2 else begin


def _rates(plan: Plan, table: Table, collected: Collected, begin: float, end: float) -> Json:
    """Completions between begin and end, of requests from before begin too."""
    done = table.rows(table.ok)
    moments, weights = _token_moments([one for one in collected.records if not one.error], collected.start)
    prompt = np.where(done.prompt_tokens >= 0, done.prompt_tokens, done.asked_prompt).astype(np.float64)
    conversations = bool(len(table) and table.turn.max() > 0)
    return {
        "offered_requests_per_s": None if conversations else plan.offered_rate,
        "offered_conversations_per_s": plan.offered_rate if conversations else None,
        "requests_per_s": stats.rate(done.end, begin, end).as_json(),
        "output_tokens_per_s": stats.rate(moments, begin, end, weights).as_json(),
        "input_tokens_per_s": stats.rate(done.end, begin, end, prompt).as_json(),
    }


def _token_moments(records: Sequence[Record], zero: float) -> tuple[Floats, Floats]:
    """When output tokens arrived, and how many: at each event of a stream, else at the answer's end."""
    moments: list[Floats] = [np.empty(0)]
    weights: list[Floats] = [np.empty(0)]
    for record in records:
        events = len(record.chunks)
        tokens = record.completion_tokens if record.completion_tokens >= 0 else events
        if events:
            moments.append(np.frombuffer(record.chunks, dtype=np.float64) - zero)
            weights.append(np.full(events, tokens / events))
        else:
            moments.append(np.array([record.end - zero]))
            weights.append(np.array([float(tokens)]))
    return np.concatenate(moments), np.concatenate(weights)


def _tokens(done: Table, collected: Collected) -> Json:
    def total(column: NDArray[np.int64]) -> int:
        return int(column[column >= 0].sum())

    told = done.cached_tokens >= 0
    prompt, cached = total(done.prompt_tokens), total(done.cached_tokens)
    events = int(done.chunks.sum())
    queries, hits = (grown(collected.server, f"prefix_cache_{what}_total") for what in ("queries", "hits"))
    return {
        "prompt": prompt,
        "prompt_put_in": int(done.asked_prompt.sum()),
        "output": int(done.output_tokens.sum()),
        "cached": cached if told.any() else None,
        "cached_share": cached / prompt if told.any() and prompt else None,
        "events": events,
        "tokens_per_event": int(done.output_tokens.sum()) / events if events else None,
        "server_prefix_hit_rate": hits / queries if queries and hits is not None else None,
    }


def checks(done: Table, records: Sequence[Record], count: Callable[[str], int] | None) -> Json:
    """How many completed requests' usage contradicts what we saw or asked; all zero is good."""
    usage = done.completion_tokens
    known = usage >= 0
    limited = done.asked_output > 0
    found = {
        "no_usage": int((~known).sum()),
        "more_events_than_tokens": int((known & (done.chunks > usage)).sum()),
        "more_tokens_than_asked": int((known & limited & (usage > done.asked_output)).sum()),
        "length_but_not_as_asked": int(
            (known & limited & (done.finish_reason == "length") & (usage != done.asked_output)).sum()
        ),
        "prompt_smaller_than_put_in": int(
            ((done.prompt_tokens >= 0) & (done.prompt_tokens < done.asked_prompt) & (done.turn == 0)).sum()
        ),
        "more_cached_than_prompt": int((done.cached_tokens > np.maximum(done.prompt_tokens, 0)).sum()),
    }
    if count is not None:
        # a stop token is counted by some servers and never shown
        wrong = [one for one in records if one.completion_tokens - count(one.text) not in (0, 1)]
        found["not_as_tokenizer_counts"] = len(wrong)
    return found


def _cost(done: Table, prices: Prices) -> Json | None:
    if not prices.given or not len(done):
        return None
    prompt = np.where(done.prompt_tokens >= 0, done.prompt_tokens, done.asked_prompt).sum()
    cached = np.maximum(done.cached_tokens, 0).sum()
    output = done.output_tokens.sum()
    cached_price = prices.input if prices.cached is None else prices.cached
    usd = float((prompt - cached) * prices.input + cached * cached_price + output * prices.output) / 1e6
    return {
        "usd": usd,
        "usd_per_request": usd / len(done),
        "usd_per_million_output_tokens": usd / float(output) * 1e6 if output else None,
        "prices": asdict(prices),
    }


# ----------------------------------------------------------------------------------------------------------- objectives


def _slo(
    part: Table, done: Table, gaps: Gaps, objectives: tuple[Objective, ...], begin: float, end: float
) -> Json | None:
    """None without objectives. Goodput and attainment as load.slo defines them."""
    if not objectives:
        return None
    good = np.ones(len(done), dtype=bool)
    found = []
    for objective in objectives:
        figure = _figure(part, done, gaps, objective)
        found.append(
            {
                "name": objective.name,
                "bound": objective.bound,
                "value": figure.as_json(),
                "met": bool(figure.value <= objective.bound),
            }
        )
        good &= _meets(done, gaps, objective)
    return {
        "met": all(one["met"] for one in found),
        "objectives": found,
        "goodput_requests_per_s": stats.rate(done.end[good], begin, end).as_json(),
        "attainment": stats.share(int(good.sum()), len(part)).as_json(),
        "reject_rate": stats.share(int((part.error == REJECTED).sum()), len(part)).as_json(),
    }


def _figure(part: Table, done: Table, gaps: Gaps, objective: Objective) -> Estimate:
    """The run's figure; NaN (which meets nothing) where it was not measured."""
    if objective.metric == "error_rate":
        return stats.share(len(part) - len(done), len(part))
    values = _values(done, gaps, objective.metric)
    return stats.mean(values) if objective.rank is None else stats.percentile(values, objective.rank)


def _meets(done: Table, gaps: Gaps, objective: Objective) -> NDArray[np.bool_]:
    """Which completed requests meet the objective by themselves. A figure that a request does not have is no breach."""
    if objective.metric == "error_rate":
        return np.ones(len(done), dtype=bool)
    if objective.metric not in ("itl", "chunk_gap"):
        return ~(done.column(objective.metric) > objective.bound)
    values, owners = gaps.of(objective.metric)
    good = np.ones(len(done), dtype=bool)
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    for begin, end in zip(starts, [*starts[1:], owners.size], strict=True):
        own = values[begin:end]
        figure = own.mean() if objective.rank is None else np.percentile(own, objective.rank)
        good[owners[begin]] = figure <= objective.bound
    return good


# ------------------------------------------------------------------------------------------------------------ over time


def _timeline(table: Table, end: float) -> Json:
    """Figures of up to 60 equal slices of the run, by the time at which requests were due."""
    last = max(end, float(table.scheduled.max()) if len(table) else 0.0)
    if last <= 0:
        return {"t": []}
    slices = int(min(60, max(4, len(table) // 20)))
    edges = np.linspace(0, last, slices + 1)
    which = np.clip(np.searchsorted(edges, table.scheduled, side="right") - 1, 0, slices - 1)
    out: Json = {"t": ((edges[:-1] + edges[1:]) / 2).round(3).tolist()}
    out["sent_per_s"] = (np.bincount(which, minlength=slices) / (last / slices)).round(4).tolist()
    done, _ = np.histogram(table.end[table.ok], bins=edges)
    out["completed_per_s"] = (done / (last / slices)).round(4).tolist()
    out["failed"] = np.bincount(which[~table.ok], minlength=slices).tolist()
    middles = (edges[:-1] + edges[1:]) / 2
    begun, ended = np.sort(table.begun[~np.isnan(table.begun)]), np.sort(table.end[~np.isnan(table.end)])
    out["in_flight"] = (np.searchsorted(begun, middles) - np.searchsorted(ended, middles)).tolist()
    for metric in ("ttft", "e2e"):
        values = np.where(table.ok, table.column(metric), np.nan)
        for rank in (50, 95, 99):
            out[f"{metric}_p{rank}"] = [_rank(values[which == one], rank) for one in range(slices)]
    return out


def _rank(values: Floats, rank: float) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(np.percentile(known, rank)), 7) if known.size else None


def _columns(table: Table) -> Mapping[str, list[Any]]:
    """The rows, rounded to a microsecond, for whoever wants to compute something else."""
    out: dict[str, list[Any]] = {}
    for name in ("index", "turn", "status", "prompt_tokens", "completion_tokens", "cached_tokens", "chunks"):
        out[name] = getattr(table, name).tolist()
    for name in ("scheduled", "begun", "sent", "first", "last", "end", "queue_s"):
        out[name] = [None if math.isnan(value) else round(value, 6) for value in getattr(table, name).tolist()]
    out["error"] = table.error.tolist()
    out["finish_reason"] = table.finish_reason.tolist()
    return out
