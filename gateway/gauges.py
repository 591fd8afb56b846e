"""What a gateway's parts say of themselves when they are asked, as gauges of /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily

from gateway.ledger.ledger import Ledger
from gateway.metrics import NEWEST_ONLY
from gateway.policy_follower import PolicyFollower
from gateway.routes import Routes
from gateway.upstreams import UpstreamModel
from policies.breaker import BreakerState


def gauges(
    upstreams: Mapping[str, UpstreamModel], routes: Mapping[str, Routes], ledger: Ledger, policies: PolicyFollower[Any]
) -> Iterator[GaugeMetricFamily]:
    """Now. Of several gateways they add up, hence a breaker's state is a count of gateways."""
    breakers = GaugeMetricFamily(
        "signalbox_upstream_breaker", "Gateways by the state of their breaker.", labels=["model_name", "state"]
    )
    running = GaugeMetricFamily("signalbox_upstream_requests", "Requests at an upstream.", labels=["model_name"])
    sockets = GaugeMetricFamily(
        "signalbox_upstream_connections", "Open connections, idle ones included.", labels=["model_name"]
    )
    for name, upstream in upstreams.items():
        current = upstream.state
        for state in BreakerState:
            breakers.add_metric([name, state.value], float(state is current))
        running.add_metric([name], upstream.connection.in_flight)
        sockets.add_metric([name], upstream.connection.open_connections)
    yield from (breakers, running, sockets)
    spared = GaugeMetricFamily(
        "signalbox_replicas_spared", "Replicas left alone because they keep failing, by gateway.", labels=["model_name"]
    )
    for name, one in routes.items():
        spared.add_metric([name], float(len(list(one.spared.names(time.monotonic())))))
    yield spared
    yield GaugeMetricFamily(
        "signalbox_ledger_reservations", "Reservations neither settled nor released.", value=ledger.open
    )
    serving = GaugeMetricFamily(
        f"{NEWEST_ONLY}generation", "Policy generation that serves; canary 0: none.", labels=["stage"]
    )
    active, canary = policies.serving
    serving.add_metric(["active"], active)
    serving.add_metric(["canary"], canary)
    yield serving
