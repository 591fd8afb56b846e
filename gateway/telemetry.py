"""The stages of a request, what traces and logs have in common, and whether traces are wanted at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from gateway.metrics import Histogram

# A stage of a request, and when it was over (perf_counter).
Mark = tuple[str, float]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_LONGEST_NAME = 256


class Laps:
    """Splits the time since arrival over the stages of a request. marks: where they are wanted, one by one."""

    def __init__(self, stages: dict[str, Histogram]) -> None:
        self._stages = stages
        self.marks: list[Mark] | None = None
        self.began = self._last = time.perf_counter()

    def lap(self, stage: str) -> float:
        now = time.perf_counter()
        self._stages[stage].observe(now - self._last)
        self._last = now
        if self.marks is not None:
            self.marks.append((stage, now))
        return now


def traces_wanted(environ: Mapping[str, str]) -> bool:
    """Whether there is somewhere to send traces to, and nobody has said not to."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(environ.get(name) for name in _ENDPOINTS)


def failure_name(error: BaseException | None) -> str:
    """What ended something, in one word of ours: an error's class, or that nobody waited for the end."""
    if error is None or isinstance(error, GeneratorExit | asyncio.CancelledError):
        return "abandoned"
    return type(error).__name__


def shown_model(name: str) -> str:
    """A model's name as a caller wrote it, within bounds."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
