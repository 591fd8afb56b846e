"""Readers of published request traces. Standard library only.

    requests = read_trace("mooncake_conversation.jsonl")
    small = scaled(requests, length_scale=32, rate_scale=2.0)

Mooncake (jsonl: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks, equal ids meaning equal
prefixes), Azure (csv: TIMESTAMP, ContextTokens, GeneratedTokens) and traffic that a gateway recorded (jsonl, below). A
line that cannot be read is named by its number.

Recorded traffic holds hashes, lengths and times, never a prompt. One JSON object a line:

    {"time": 1764000000.125, "prompt_tokens": 70, "output_tokens": 12, "block_tokens": 16, "hashes": ["9f3c…", …]}

time: seconds, of any epoch. hashes: hexadecimal, one per full block of the prompt in order, each chained to the one
before (as `replicas.protocol.block_hash` is), so that equal hashes mean equal prefixes; may be left out. Other keys are
ignored; `policies.traffic` says what gateways write.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

MOONCAKE_BLOCK_TOKENS = 512


class TraceError(ValueError):
    """A trace that cannot be used; the message names file and line."""

    def __init__(self, path: str | Path, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = str(path), line, reason


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """arrival_s counts from the trace's first request.

    prefix_ids: one per block_tokens of the prompt (the last may be partly filled); requests that begin with the same
    ids begin with the same tokens. Empty where the trace says nothing of contents.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK_TOKENS


def read_trace(path: str | Path, limit: int | None = None) -> list[TraceRequest]:
    """Every request of a .jsonl (Mooncake or recorded) or .csv (Azure) trace, or the first `limit`, by arrival.

    A folder stands for all the .jsonl files in it, as several gateways write them. Raises TraceError naming the first
    bad line, OSError where the file cannot be opened.
    """
    found: list[TraceRequest] = []
    for file in sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(path)]:
        _read_file(file, found, limit)
    if not found:
        raise TraceError(path, 1, "holds no request")
    found.sort(key=lambda request: request.arrival_s)
    first = found[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first) for request in found]


def _read_file(path: Path, found: list[TraceRequest], limit: int | None) -> None:
    reader: Callable[[Iterable[str], str | Path], Iterator[TraceRequest]]
    reader = {".jsonl": _jsonl, ".csv": _azure}.get(path.suffix, _unknown)
    before = len(found)
    with open(path, encoding="utf-8", newline="") as lines:
        try:
            for request in reader(lines, path):
                if limit is not None and len(found) >= limit:
                    break
                found.append(request)
        except UnicodeDecodeError as error:
            raise TraceError(path, len(found) - before + 1, f"not UTF-8 from here on: {error.reason}") from None


def scaled(requests: Sequence[TraceRequest], *, length_scale: int = 1, rate_scale: float = 1.0) -> list[TraceRequest]:
    """Lengths divided by `length_scale`, arrivals `rate_scale` times as fast.

    A Mooncake block of 512 tokens becomes one of 512 / length_scale; rounding down keeps exactly those blocks full that
    were full, so prefixes are shared as before.
    """
    return [
        replace(
            request,
            arrival_s=request.arrival_s / rate_scale,
            prompt_tokens=max(1, request.prompt_tokens // length_scale),
            output_tokens=max(1, request.output_tokens // length_scale),
            block_tokens=max(1, request.block_tokens // length_scale),
        )
        for request in requests
    ]


def mean_rate(requests: Sequence[TraceRequest]) -> float:
    """Requests a second between the first arrival and the last."""
    span = requests[-1].arrival_s - requests[0].arrival_s
    return (len(requests) - 1) / span if span > 0 else float("inf")


def _jsonl(lines: Iterable[str], path: str | Path) -> Iterator[TraceRequest]:
    """Mooncake or recorded, as the first line's keys say."""
    read: Callable[[dict[str, Any], str | Path, int], TraceRequest] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if read is recorded_request and not line.endswith("\n"):
                return  # what a killed gateway was writing
            raise TraceError(path, number, f"not JSON: {error}") from None
        if not isinstance(record, dict):
            raise TraceError(path, number, "not a JSON object")
        if read is None:
            read = recorded_request if "prompt_tokens" in record else _mooncake
        yield read(record, path, number)


def _mooncake(record: dict[str, Any], path: str | Path, number: int) -> TraceRequest:
    prompt = _count(record.get("input_length"), "input_length", path, number)
    ids = record.get("hash_ids")
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise TraceError(path, number, "hash_ids must be a list of integers")
    if len(ids) < prompt // MOONCAKE_BLOCK_TOKENS:
        raise TraceError(path, number, f"{len(ids)} hash_ids are too few for an input_length of {prompt}")
    return TraceRequest(
        _number(record.get("timestamp"), "timestamp", path, number) / 1000,
        prompt,
        _count(record.get("output_length"), "output_length", path, number),
        tuple(ids),
    )


def recorded_request(record: dict[str, Any], path: str | Path, number: int) -> TraceRequest:
    """One line of recorded traffic; its arrival is as the line says. TraceError."""
    prompt = _count(record.get("prompt_tokens"), "prompt_tokens", path, number)
    output = _count(record.get("output_tokens"), "output_tokens", path, number)
    block = _count(record.get("block_tokens", MOONCAKE_BLOCK_TOKENS), "block_tokens", path, number)
    hashes = record.get("hashes", [])
    if not isinstance(hashes, list) or not all(isinstance(one, str) for one in hashes):
        raise TraceError(path, number, "hashes must be a list of hexadecimal strings")
    if block < 1:
        raise TraceError(path, number, "block_tokens must be at least 1")
    if hashes and len(hashes) < prompt // block:
        raise TraceError(path, number, f"{len(hashes)} hashes are too few for prompt_tokens of {prompt}")
    try:
        ids = tuple(int(one, 16) for one in hashes)
    except ValueError:
        raise TraceError(path, number, "hashes must be a list of hexadecimal strings") from None
    return TraceRequest(_number(record.get("time"), "time", path, number), prompt, output, ids, block)


def _azure(lines: Iterable[str], path: str | Path) -> Iterator[TraceRequest]:
    rows = csv.reader(lines)
    header = [name.strip().lstrip("\ufeff") for name in next(rows, [])]
    try:
        columns = [header.index(name) for name in ("TIMESTAMP", "ContextTokens", "GeneratedTokens")]
    except ValueError:
        raise TraceError(path, 1, "the header must name TIMESTAMP, ContextTokens and GeneratedTokens") from None
    start: datetime | None = None
    for row in rows:
        if not row:
            continue
        if len(row) <= max(columns):
            raise TraceError(path, rows.line_num, f"{len(row)} fields, the header names {len(header)}")
        stamp, prompt, output = (row[column].strip() for column in columns)
        try:
            # seven digits of a second are one more than Python reads
            seconds, _, fraction = stamp.partition(".")
            moment = datetime.fromisoformat(seconds)
            rest = float(f"0.{fraction}") if fraction else 0.0
        except ValueError:
            raise TraceError(path, rows.line_num, f"TIMESTAMP {stamp!r} is no date and time") from None
        start = start or moment
        yield TraceRequest(
            (moment - start).total_seconds() + rest,
            _count(prompt, "ContextTokens", path, rows.line_num),
            _count(output, "GeneratedTokens", path, rows.line_num),
        )


def _unknown(lines: Iterable[str], path: str | Path) -> Iterator[TraceRequest]:
    raise TraceError(path, 1, "a trace ends in .jsonl (Mooncake or recorded) or .csv (Azure)")


def _count(value: Any, name: str, path: str | Path, line: int) -> int:
    number = _number(value, name, path, line)
    if number != int(number):
        raise TraceError(path, line, f"{name} must be a whole number, got {value!r}")
    return int(number)


def _number(value: Any, name: str, path: str | Path, line: int) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        raise TraceError(path, line, f"{name} must be a number, got {value!r}") from None
    if not 0 <= number < 1e15:
        raise TraceError(path, line, f"{name} must be at least 0, got {value!r}")
    return number
