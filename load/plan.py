"""What one run does, as plain picklable values: parent and worker processes read the same plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from load.arrivals import Stage, due_times
from load.http1 import Origin, request_head
from load.workload import Ask, Workload

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True)
class Target:
    """Where requests go and what every one of them says. The key is in no repr and in no result.

    ends_with_done: a stream without [DONE] is cut. False for a server that never sends one.
    """

    origin: Origin
    model: str
    endpoint: str = "chat"
    stream: bool = True
    api_key: str = field(default="", repr=False)
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    verify_tls: bool = True
    ends_with_done: bool = True

    def head(self) -> bytes:
        headers = {
            "content-type": "application/json",
            "accept": "text/event-stream" if self.stream else "application/json",
            "user-agent": "signalbox-load",
        }
        return request_head(self.origin, "POST", PATHS[self.endpoint], headers | self.authorization())

    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, ask: Ask) -> bytes:
        """The JSON of a request. `extra` is merged in last; null in it takes a field away."""
        fields: dict[str, Any] = {"model": self.model}
        if self.endpoint == "chat":
            text = isinstance(ask.prompt, str)
            fields["messages"] = [{"role": "user", "content": ask.prompt}] if text else ask.prompt
        else:
            fields["prompt"] = ask.prompt
        if ask.max_tokens is not None:
            fields["max_tokens"] = ask.max_tokens
        fields["temperature"] = 0
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.stream:
            fields["stream"] = True
            fields["stream_options"] = {"include_usage": True}
        if self.extra:
            merge(fields, self.extra)
        return json.dumps(fields, separators=(",", ":")).encode()


def merge(fields: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """RFC 7396 (JSON merge patch), in place."""
    for name, value in extra.items():
        if value is None:
            fields.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(fields.get(name), dict):
            merge(fields[name], value)
        else:
            fields[name] = value


@dataclass(frozen=True)
class OpenLoop:
    """Requests (or conversations) begin when they are due, whatever the server does."""

    stages: tuple[Stage, ...]
    process: str = "poisson"
    burstiness: float = 1.0
    limit: int | None = None

    def times(self, seed: int) -> NDArray[np.float64]:
        return due_times(self.stages, self.process, burstiness=self.burstiness, seed=seed, limit=self.limit)

    @property
    def duration_s(self) -> float | None:
        """None when a number of requests ends the load before the time does."""
        return None if self.limit is not None else sum(stage.duration_s for stage in self.stages)


@dataclass(frozen=True)
class Replayed:
    """The due times of a trace."""

    due: tuple[float, ...]

    def times(self, seed: int) -> NDArray[np.float64]:
        return np.asarray(self.due, dtype=np.float64)

    duration_s: float | None = None


@dataclass(frozen=True)
class ClosedLoop:
    """`concurrency` callers; each asks again `think_s` after its answer. Ends with the time or the number of asks."""

    concurrency: int
    duration_s: float | None = None
    limit: int | None = None
    think_s: float = 0.0


Arrivals = OpenLoop | Replayed | ClosedLoop


@dataclass(frozen=True)
class Plan:
    """One run at one load. `keep_text` sends answers' texts back, to be counted with a tokenizer."""

    target: Target
    workload: Workload
    arrivals: Arrivals
    seed: int = 0
    workers: int = 1
    timeout_s: float = 300.0
    drain_s: float = 60.0
    keep_text: bool = False
    scrape: bool = True

    @property
    def offered_rate(self) -> float | None:
        """Requests a second that are due on average; None in a closed loop."""
        if isinstance(self.arrivals, ClosedLoop):
            return None
        times = self.arrivals.times(self.seed)
        span = self.arrivals.duration_s or (float(times[-1] - times[0]) if times.size > 1 else 0.0)
        return times.size / span if span > 0 else None
