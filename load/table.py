"""A run's records as columns, and the definitions of what is measured (docs/load.md states them for readers).

    ttft       first content - scheduled          e2e   end - scheduled           lag  begun - scheduled
    tpot       (e2e - ttft) / (n - 1), n output tokens, of requests with two or more
    chunk_gap  time between consecutive events with content; an event may carry several tokens
    itl        a gap divided by the tokens of the event that ended it, once per such token
    queue      as the server told it
    *_sent     the same counted from `begun`, the moment we turned to the request: what a generator that forgets its own
               lag would report

An event's tokens are what usage in the event says; else the request's output tokens spread evenly over its events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from load.record import Record
from load.stats import Floats

Ints = NDArray[np.int64]
_MOST_GAPS = 20_000_000


@dataclass(frozen=True)
class Table:
    """One row per request, in the order they were due. Times are seconds from the run's start."""

    index: Ints
    turn: Ints
    scheduled: Floats
    begun: Floats
    sent: Floats
    first: Floats
    last: Floats
    end: Floats
    status: Ints
    prompt_tokens: Ints
    completion_tokens: Ints
    cached_tokens: Ints
    asked_prompt: Ints
    asked_output: Ints
    chunks: Ints
    queue_s: Floats
    error: NDArray[np.str_]
    finish_reason: NDArray[np.str_]

    @property
    def ok(self) -> NDArray[np.bool_]:
        return np.asarray(self.error == "", dtype=np.bool_)

    @cached_property
    def output_tokens(self) -> Ints:
        """What usage says, or the number of events where it says nothing."""
        return np.where(self.completion_tokens >= 0, self.completion_tokens, self.chunks)

    def column(self, metric: str) -> Floats:
        """One value per row, NaN where it has none; not for the gaps."""
        with np.errstate(invalid="ignore", divide="ignore"):
            match metric:
                case "ttft":
                    return self.first - self.scheduled
                case "e2e":
                    return self.end - self.scheduled
                case "ttft_sent":
                    return self.first - self.begun
                case "e2e_sent":
                    return self.end - self.begun
                case "lag":
                    return self.begun - self.scheduled
                case "connect":
                    return self.sent - self.begun
                case "queue":
                    return self.queue_s
                case "tpot":
                    several = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
                    return (self.end - self.first) / several
        raise AssertionError(f"no metric {metric!r}")

    def rows(self, chosen: NDArray[Any]) -> Table:
        return Table(**{one.name: getattr(self, one.name)[chosen] for one in fields(self)})

    def __len__(self) -> int:
        return int(self.index.size)


def table_of(records: Sequence[Record], start: float) -> Table:
    def numbers(name: str, zero: float = 0.0) -> Floats:
        return np.array([getattr(record, name) for record in records], dtype=np.float64) - zero

    def counts(name: str) -> Ints:
        return np.array([getattr(record, name) for record in records], dtype=np.int64)

    whole = ("index", "turn", "status", "prompt_tokens", "completion_tokens", "cached_tokens")
    columns: dict[str, Any] = {name: counts(name) for name in (*whole, "asked_prompt", "asked_output")}
    columns |= {name: numbers(name, start) for name in ("scheduled", "begun", "sent", "first", "last", "end")}
    return Table(
        **columns,
        queue_s=numbers("queue_s"),
        chunks=np.array([len(record.chunks) for record in records], dtype=np.int64),
        error=np.array([record.error for record in records], dtype=np.str_),
        finish_reason=np.array([record.finish_reason for record in records], dtype=np.str_),
    )


@dataclass(frozen=True)
class Gaps:
    """All gaps of some requests, request after request; `owner` is the position of each one's request."""

    chunk_gap: Floats
    chunk_owner: Ints
    itl: Floats
    itl_owner: Ints

    def of(self, metric: str) -> tuple[Floats, Ints]:
        return (self.itl, self.itl_owner) if metric == "itl" else (self.chunk_gap, self.chunk_owner)


def gaps_of(records: Sequence[Record]) -> Gaps:
    """From the raw times. Of more than 20 million events every n-th request is taken."""
    events = sum(len(record.chunks) for record in records)
    stride = max(1, math.ceil(events / _MOST_GAPS))
    chunk: list[Floats] = []
    owners: list[int] = []
    tokens: list[Ints] = []
    for position in range(0, len(records), stride):
        record = records[position]
        if len(record.chunks) > 1:
            chunk.append(np.diff(np.frombuffer(record.chunks, dtype=np.float64)))
            tokens.append(event_tokens(record)[1:])
            owners.append(position)
    if not chunk:
        nothing, nobody = np.empty(0), np.empty(0, dtype=np.int64)
        return Gaps(nothing, nobody, nothing, nobody)
    chunk_owner = np.repeat(np.array(owners), [one.size for one in chunk])
    gaps, counts = np.concatenate(chunk), np.concatenate(tokens)
    single = np.repeat(gaps / np.maximum(counts, 1), counts)
    return Gaps(gaps, chunk_owner, single, np.repeat(chunk_owner, counts))


def event_tokens(record: Record) -> Ints:
    """Tokens of each event, in whole numbers that add up to the request's output tokens (if it told them)."""
    events = len(record.chunks)
    if record.chunk_tokens:
        return np.array(record.chunk_tokens, dtype=np.int64)
    if record.completion_tokens in (-1, events):
        return np.ones(events, dtype=np.int64)
    ends = np.arange(1, events + 1) * record.completion_tokens // events
    return np.diff(ends, prepend=0)
