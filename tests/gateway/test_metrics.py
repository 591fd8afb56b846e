"""/metrics: what a parser reads, under the names that dashboards know, with no more series than there are things."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import Retries, ServedModel
from gateway.metrics import Metrics
from gateway.totals import exported, merged
from replicas.fake import FakeSettings
from replicas.protocol import EngineStats, ReplicaAddress, ReplicaState, ReplicaStatus
from replicas.upstream_config import Upstream
from tests.gateway.conftest import MODEL, Gateway, StartGateway

ENGINE = {
    "signalbox_num_requests_running": "gauge",
    "signalbox_num_requests_waiting": "gauge",
    "signalbox_kv_cache_usage_perc": "gauge",
    "signalbox_host_cache_usage_perc": "gauge",
    "signalbox_host_cache_hits": "counter",
    "signalbox_host_cache_offloaded_blocks": "counter",
    "signalbox_host_cache_fetched_blocks": "counter",
    "signalbox_host_cache_offloaded_bytes": "counter",
    "signalbox_host_cache_fetched_bytes": "counter",
    "signalbox_prefix_cache_queries": "counter",
    "signalbox_prefix_cache_hits": "counter",
    "signalbox_num_preemptions": "counter",
    "signalbox_spec_decode_num_draft_tokens": "counter",
    "signalbox_spec_decode_num_accepted_tokens": "counter",
    "signalbox_spec_decode_num_accepted_tokens_per_pos": "counter",
    "signalbox_time_to_first_token_seconds": "histogram",
    "signalbox_inter_token_latency_seconds": "histogram",
    "signalbox_e2e_request_latency_seconds": "histogram",
}

METHODS = ("GET", "DELETE", "PROPFIND", "MKCOL", "LOCK", "SEARCH", "PURGE")


def families(gateway: Gateway) -> dict[str, str]:
    """Type by name; asserts that every family is declared once and has a help text."""
    with gateway.http() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = list(text_string_to_metric_families(answer.text))
    assert len({one.name for one in found}) == len(found)
    assert all(one.documentation for one in found)
    return {one.name: one.type for one in found}


def series(gateway: Gateway) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with gateway.http() as http:
        text = http.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(one.name, frozenset(one.labels.items())): one.value for one in samples}
    assert len(found) == len(samples), "a series is there twice"
    return found


def value(gateway: Gateway, name: str, **labels: str) -> float:
    return series(gateway)[name, frozenset(labels.items())]


def test_names_and_types_are_those_that_dashboards_know(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    with gateway.http() as http:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
    found = families(gateway)
    assert ENGINE.items() <= found.items()
    assert all(name.startswith(("signalbox_", "process_")) for name in found)


async def test_nothing_a_caller_invents_becomes_a_series(start_gateway: StartGateway) -> None:
    gateway = start_gateway()

    async def invent(number: int) -> None:
        body = {"model": f"m{number}", "messages": [{"role": "user", "content": "a"}]}
        await http.post("/v1/chat/completions", json=body, headers={"x-request-id": f"r{number}"})
        await http.request(METHODS[number % len(METHODS)], f"/v1/models/m{number}")
        await http.get(f"/invented/{number}?a={number}")

    async with gateway.client(limits=httpx.Limits(max_connections=32), timeout=60) as http:
        await asyncio.gather(*map(invent, range(len(METHODS))))
        await http.get("/metrics")
        before = set(series(gateway))
        await asyncio.gather(*map(invent, range(334)))
    assert set(series(gateway)) == before
    assert value(gateway, "signalbox_http_requests_total", route="unmatched", method="GET", status="404") > 334


def test_an_upstreams_breaker_and_connections_show(start_gateway: StartGateway) -> None:
    gone = Upstream(name="far", base_url="http://127.0.0.1:9/v1", upstream_model="x", tokenizer="estimate")
    models = (ServedModel(name=MODEL), ServedModel(name="far"))
    gateway = start_gateway(models=models, upstreams=(gone,), retries=Retries(attempts=1, wait_s=1))
    assert value(gateway, "signalbox_upstream_breaker", model_name="far", state="closed") == 1
    with gateway.http() as http:
        for _ in range(6):
            http.post("/v1/completions", json={"model": "far", "prompt": "a", "max_tokens": 4})
    assert value(gateway, "signalbox_upstream_breaker", model_name="far", state="open") == 1
    assert value(gateway, "signalbox_upstream_breaker", model_name="far", state="closed") == 0
    assert value(gateway, "signalbox_upstream_connections", model_name="far") == 0
    assert value(gateway, "signalbox_upstream_requests", model_name="far") == 0


def test_open_reservations_and_the_policy_generation_show(start_gateway: StartGateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50)])
    assert value(gateway, "signalbox_policy_generation", stage="active") == 0
    with gateway.register() as register:
        register.publish("aliases: {other: fake}", author="test")
    gateway.wait_until(lambda: value(gateway, "signalbox_policy_generation", stage="active") == 1)
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4000, "stream": True}
    with gateway.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()  # kept: its end closes the connection
        next(lines)
        assert value(gateway, "signalbox_ledger_reservations") == 1
    gateway.wait_until(lambda: value(gateway, "signalbox_ledger_reservations") == 0)


def test_a_replicas_host_cache_shows_in_shares_blocks_and_bytes() -> None:
    stats = EngineStats(
        host_cache_blocks_total=8,
        host_cache_blocks_used=2,
        host_cache_block_bytes=1000,
        host_cache_offloaded_blocks=5,
        host_cache_fetched_blocks=3,
        host_cache_hits=48,
    )
    status = ReplicaStatus(replica_id="a", incarnation="1", model=MODEL, state=ReplicaState.READY, stats=stats)
    address = ReplicaAddress(replica_id="a", incarnation="1", model=MODEL, endpoint="", events_endpoint="")
    metrics = Metrics([MODEL])
    metrics.follow(lambda: [SimpleNamespace(address=address, status=status)], tuple)  # type: ignore[list-item]
    found = {sample.name: sample.value for family in metrics.families() for sample in family.samples}
    shown = {name.removeprefix("signalbox_host_cache_"): v for name, v in found.items() if "host_cache" in name}
    assert shown == {
        "usage_perc": 0.25,
        "hits_total": 48,
        "offloaded_blocks_total": 5,
        "fetched_blocks_total": 3,
        "offloaded_bytes_total": 5000,
        "fetched_bytes_total": 3000,
    }


@pytest.mark.parametrize(("name", "labels", "total"), [("policy_generation", ["stage"], 3), ("other", ["stage"], 6)])
def test_of_what_all_gateways_know_alike_nothing_adds_up(name: str, labels: list[str], total: float) -> None:
    own = Metrics([])
    other = [(f"signalbox_{name}", "help", "gauge", [(f"signalbox_{name}", {"stage": "active"}, 3.0)])]
    found = merged(own.families(), [other, other])
    (family,) = (one for one in found if one.name == f"signalbox_{name}")
    assert [sample.value for sample in family.samples] == [total]
    assert exported(own)
