"""/metrics of all gateways as one: a scraper reaches whichever gateway the proxy picks, and must see the same counters.

Numbers of gateways are added up. Numbers of replicas, and of policies, every gateway knows alike: the largest is the
newest, because they are counters, or gauges a moment apart. What describes one process only stays this gateway's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gateway.mailbox import Mailbox
from gateway.metrics import NEWEST_ONLY, Metrics

METRICS = "metrics"  # the kind of question
_PROCESS = "process_"
# Scraped more often than this, several gateways give the same answer: nobody may make them write as fast as he asks.
_FRESH_S = 1.0

# A family as JSON: name, help, type, [sample's name, labels, value].
Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


def exported(metrics: Metrics) -> list[Family]:
    """What this gateway tells the others."""
    return [
        (one.name, one.documentation, one.type, [(s.name, s.labels, s.value) for s in one.samples])
        for one in metrics.families()
        if not one.name.startswith(_PROCESS)
    ]


def merged(own: Iterable[Metric], others: Iterable[list[Family]]) -> list[Metric]:
    families = {one.name: one for one in own}
    for name, help_text, kind, samples in (family for other in others for family in other):
        family = families.setdefault(name, Metric(name, help_text, kind))
        values = {(s.name, tuple(s.labels.items())): s.value for s in family.samples}
        for sample, labels, value in samples:
            key = (sample, tuple(labels.items()))
            known = values.get(key, 0.0)
            same = "replica" in labels or name.startswith(NEWEST_ONLY)
            values[key] = max(known, value) if same else known + value
        family.samples = []
        for (sample, labelled), value in values.items():
            family.add_sample(sample, dict(labelled), value)
    return list(families.values())


class _Fixed(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class Totals:
    """The text of /metrics, gathered from every live gateway."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gathering = asyncio.Lock()
        self._text, self._at = b"", float("-inf")

    async def export(self, _: str) -> list[Family]:
        """What the mailbox answers to other gateways."""
        return exported(self._metrics)

    async def text(self, mailbox: Mailbox) -> bytes:
        async with self._gathering:
            if time.monotonic() - self._at > _FRESH_S:
                answers: list[Any] = await mailbox.ask(METRICS, "")
                registry = CollectorRegistry(auto_describe=False)
                registry.register(_Fixed(merged(self._metrics.families(), answers[1:])))
                self._text = generate_latest(registry)
                self._at = time.monotonic() if len(answers) > 1 else self._at
            return self._text
