"""Traffic that gateways recorded of themselves: who asked what when, as hashes, lengths and times, never a word of it.

    recorded = read_traffic(folder, since=now - 86400)

A line holds what `policies.traces` reads (time, prompt_tokens, output_tokens, block_tokens, hashes) and these:

    key_id, key, team      whose request; the policy that serves a key and its budgets go by them
    asked, model           the name that was asked for, and the model that answered ("" where none did)
    generation, status     the policy's, and the HTTP status; failure: the kind of error, "" where there was none
    max_tokens             what was reserved for; cached_tokens: of the prompt, found in a prefix cache
    ttft_s, e2e_s          seconds from the request's arrival at the gateway; null where there was none
    cost                   pico-dollars
    quality                by model, as predicted where a predictor chose

Hashes are keyed (blake2b under a key that only the gateways have): equal prefixes are equal, but nobody can confirm a
guessed prompt. Gateways that share a secret write hashes that can be merged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policies.traces import TraceError, TraceRequest, recorded_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One line; `request.arrival_s` is in seconds of the epoch."""

    request: TraceRequest
    key_id: str = ""
    key: str = ""
    team: str = ""
    asked: str = ""
    model: str = ""
    generation: int = 0
    status: int = 200
    failure: str = ""
    max_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: float | None = None
    e2e_s: float | None = None
    cost: int = 0
    quality: Mapping[str, float] = field(default_factory=dict)

    @property
    def at(self) -> float:
        return self.request.arrival_s


def read_traffic(path: Path, since: float = 0.0, until: float = float("inf")) -> list[Recorded]:
    """What was recorded in a file or a folder of files and arrived in [since, until), in the order of time.

    A last line without its end is what a killed gateway was writing, and is left out. TraceError names any other line
    that cannot be read; OSError.
    """
    found = [one for file in traffic_files(path, since) for one in _read(file) if since <= one.at < until]
    found.sort(key=lambda one: one.at)
    return found


def traffic_files(path: Path, since: float = 0.0) -> list[Path]:
    """The files of a folder that may hold what is younger than `since`; a file stands for itself."""
    if not path.is_dir():
        return [path]
    found = []
    for file in sorted(path.glob("*.jsonl")):
        try:
            if file.stat().st_mtime >= since:
                found.append(file)
        except FileNotFoundError:
            continue  # its time was up
    return found


def _read(path: Path) -> Iterator[Recorded]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith("\n"):
                    return
                raise TraceError(path, number, f"not JSON: {error}") from None
            if not isinstance(record, dict):
                raise TraceError(path, number, "not a JSON object")
            yield _recorded(record, path, number)


_TEXTS = ("key_id", "key", "team", "asked", "model", "failure")
_COUNTS = ("generation", "status", "max_tokens", "cached_tokens", "cost")
_TIMES = ("ttft_s", "e2e_s")


def _recorded(record: dict[str, Any], path: Path, number: int) -> Recorded:
    stated: dict[str, Any] = {}
    for names, kinds in ((_TEXTS, str), (_COUNTS, int), (_TIMES, int | float | None)):
        for name in names:
            if name in record:
                if not isinstance(record[name], kinds) or isinstance(record[name], bool):
                    raise TraceError(path, number, f"{name} cannot be {record[name]!r}")
                stated[name] = record[name]
    quality = record.get("quality", {})
    if not isinstance(quality, dict) or not all(isinstance(value, int | float) for value in quality.values()):
        raise TraceError(path, number, "quality must be numbers by model")
    return Recorded(request=recorded_request(record, path, number), quality=quality, **stated)
