"""Replicas' load as the server itself tells it: /metrics in Prometheus' text format, read every second of a run."""

from __future__ import annotations

import http.client
import re
import threading
from dataclasses import dataclass, field

from load.http1 import Origin, clock

# Names end in these whatever the server's prefix is (signalbox_, vllm:, sglang:, null_).
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_running_reqs", "num_queue_reqs")
COUNTERS = ("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total")
SUMS = ("queue_time_seconds_sum", "queue_time_seconds_count")

_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?\s+(\S+)", re.MULTILINE)
_MOST_SERIES = 512
_MOST_BYTES = 8_000_000


@dataclass
class Series:
    """One labelled metric: seconds from the start of the run, and values."""

    name: str
    labels: str
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def parse(text: str) -> dict[tuple[str, str], float]:
    """(name without prefix, labels) → value, of the metrics that we know."""
    found = {}
    for name, labels, value in _LINE.findall(text):
        known = next((one for one in (*GAUGES, *COUNTERS, *SUMS) if name.endswith(one)), None)
        if known is not None:
            try:
                found[known, labels] = float(value)
            except ValueError:
                continue
    return found


class Scraper:
    """A thread that reads /metrics every `interval_s`; a server without that page is left alone after one try."""

    def __init__(self, origin: Origin, verify: bool = True, interval_s: float = 1.0) -> None:
        self._origin, self._verify, self._interval_s = origin, verify, interval_s
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._series: dict[tuple[str, str], Series] = {}

    def start(self, zero: float) -> None:
        self._zero = zero
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> list[Series]:
        self._over.set()
        if self._thread is not None:
            self._thread.join(5)
        return list(self._series.values())

    def _work(self) -> None:
        while True:
            if not self._read() and not self._series:
                return
            if self._over.is_set():
                return
            self._over.wait(self._interval_s)  # the last reading is taken when the run is over

    def _read(self) -> bool:
        from load.execute import connect

        connection = connect(self._origin, verify=self._verify, timeout_s=3.0)
        try:
            connection.request("GET", f"{self._origin.path}/metrics")
            response = connection.getresponse()
            text = response.read(_MOST_BYTES).decode("utf-8", "replace")
            if response.status != 200:
                return False
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        now = clock() - self._zero
        for (name, labels), value in parse(text).items():
            if (name, labels) not in self._series and len(self._series) >= _MOST_SERIES:
                continue
            series = self._series.setdefault((name, labels), Series(name, labels))
            series.times.append(now)
            series.values.append(value)
        return True


def grown(series: list[Series], name: str) -> float | None:
    """How much a counter grew during the run, all labels together; None where the server has no such counter."""
    found = [one.values[-1] - one.values[0] for one in series if one.name == name and one.values]
    return sum(found) if found else None
