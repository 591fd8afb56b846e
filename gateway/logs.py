"""Structured logs: one JSON object a line, each with the id of the request that it was written for.

    SIGNALBOX_LOG=json           to standard error
    SIGNALBOX_LOG=json:PATH      appended to a file; a relative path is within the gateway's state_dir

Off without it. When it is on, every answered request is a line of `signalbox.requests` (scrapes and health checks only
at DEBUG), and whatever anybody logs meanwhile carries the request's id. Of an exception only its class and the lines of
code are written, never its message, which may quote a prompt; the messages of our own errors are made for callers.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from logging.handlers import WatchedFileHandler
from pathlib import Path
from traceback import format_tb
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gateway.telemetry import shown_model
from replicas.protocol import ConfigError, SignalboxError

if TYPE_CHECKING:
    from gateway.edge import Exchange
    from gateway.explain import Record, Step

REQUESTS = "signalbox.requests"
# Whose INFO is worth a line.
_OURS = ("gateway", "policies", "replicas", "signalbox")
_QUIET = frozenset({"/health", "/metrics"})

# The request that the current task serves; set only while logs are on.
current: ContextVar[Exchange | None] = ContextVar("signalbox_request", default=None)


class Redacted(Exception):
    """Stands for an exception whose message may hold what a caller wrote."""


def redacted(error: BaseException) -> Redacted:
    """The same class name, the same lines of code, no message: for `exc_info`."""
    message = f": {error.message}" if isinstance(error, SignalboxError) else " (its message is withheld)"
    safe = Redacted(f"{type(error).__name__}{message}").with_traceback(error.__traceback__)
    safe.__cause__ = redacted(error.__cause__) if error.__cause__ is not None else None
    return safe


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, and what is known of the request."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        exchange = current.get()
        if exchange is not None:
            line["request_id"] = exchange.request_id.decode()
            if exchange.trace is not None:
                line["trace_id"] = exchange.trace.trace_id
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            _, error, trace = record.exc_info
            line |= {"exception": _name(error), "stack": _stack(error, trace)}
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str)


def _name(error: BaseException) -> str:
    return str(error) if isinstance(error, Redacted) else type(error).__name__


def _stack(error: BaseException, trace: TracebackType | None) -> list[str]:
    """Innermost call last, causes first."""
    before: list[str] = []
    if error.__cause__ is not None:
        before = [*_stack(error.__cause__, error.__cause__.__traceback__), f"led to {_name(error)}"]
    return [*before, *(line.rstrip() for line in format_tb(trace))]


def wanted(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("SIGNALBOX_LOG"))


def destination(environ: Mapping[str, str], state_dir: str) -> logging.Handler | None:
    """Where SIGNALBOX_LOG sends logs; None for nowhere. ConfigError for anything that it cannot mean."""
    if not wanted(environ):
        return None
    given = environ["SIGNALBOX_LOG"]
    kind, _, path = given.partition(":")
    if kind != "json" or given == "json:":
        raise ConfigError(f"SIGNALBOX_LOG must be json or json:PATH, not {given!r}")
    if not path:
        return logging.StreamHandler()
    try:
        # opened anew when somebody has moved it away, so that it can be rotated; a line is one write at its end, so
        # that several gateways may share it
        return WatchedFileHandler(Path(state_dir or os.curdir) / path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"SIGNALBOX_LOG: {path!r} cannot be written: {error.strerror}") from error


def install(handler: logging.Handler) -> Callable[[], None]:
    """Send everybody's records to `handler` as JSON; the answer undoes it."""
    handler.setFormatter(JsonFormatter())
    levels = {name: logging.getLogger(name).level for name in _OURS}
    for name, level in levels.items():
        if level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)

    def remove() -> None:
        logging.getLogger().removeHandler(handler)
        handler.close()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

    return remove


_requests = logging.getLogger(REQUESTS)


def answered(exchange: Exchange, *, method: str, route: str, seconds: float) -> None:
    """A request is over: its line."""
    level = logging.DEBUG if route in _QUIET else logging.INFO
    if not _requests.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"method": method, "route": route, "status": exchange.status, "duration_s": _s(seconds)}
    if exchange.failure:
        fields["error"] = exchange.failure
    if exchange.record is not None:
        fields |= _of_record(exchange.record)
    _requests.log(level, "%s %s %d", method, route, exchange.status, extra={"fields": fields})


def _of_record(record: Record) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "key_id": record.key_id,
        "model": shown_model(record.asked),
        "stream": record.stream,
        "generation": record.generation,
        "prompt_tokens": record.prompt_tokens,
    }
    if record.group is not None:
        fields["group"] = record.group
    if (answered := record.answered) is None:
        return fields
    attempts = sum(len(step.attempts) for step in record.steps if step.role != "shadow")
    return fields | _of_step(answered) | {"attempts": attempts}


def _of_step(step: Step) -> dict[str, Any]:
    """The model that answered, or was the last to try."""
    fields: dict[str, Any] = {"answered_by": step.model}
    if attempts := step.attempts:
        fields["replica"] = attempts[-1].decision.replica_id
    if step.ttft_s is not None:
        fields["ttft_s"] = _s(step.ttft_s)
    timings = [job.timing for job in step.jobs if job.timing is not None]
    if timings:  # of several prompts the slowest part each
        for name in ("queued_s", "prefill_s", "decode_s"):
            fields[name] = _s(max(getattr(timing, name) for timing in timings))
    if used := [job.used for job in step.jobs if job.used is not None]:
        fields["completion_tokens"] = sum(usage.completion_tokens for usage in used)
        fields["cached_tokens"] = sum(usage.cached_tokens for usage in used)
    return fields


def _s(seconds: float) -> float:
    return round(seconds, 6)
