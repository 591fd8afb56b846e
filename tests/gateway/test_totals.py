"""/metrics adds up over gateways."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.conftest import MODEL, Gateway, StartGateway, running


def samples(gateway: Gateway) -> dict[tuple[str, ...], float]:
    """By name and label values."""
    with gateway.http() as http:
        text = http.get("/metrics").text
    return {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def ask(gateway: Gateway) -> None:
    with gateway.http() as http:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200


def test_whichever_gateway_is_asked_counters_are_those_of_all(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    ask(gateway)
    with running(gateway.config_of_another(), gateway.key) as other:
        other.loop.call_soon_threadsafe(other.directory.publish, [one.server.address for one in gateway.replicas])
        other.wait_ready(1)
        ask(other)
        ask(other)
        for one in (gateway, other):
            found = samples(one)
            assert found["signalbox_http_requests_total", "POST", "/v1/completions", "200"] == 3
            assert found["signalbox_gateway_tokens_total", "completion", MODEL] == 12
            assert found["signalbox_time_to_first_token_seconds_count", MODEL] == 3
            assert found["signalbox_time_to_first_token_seconds_bucket", "+Inf", MODEL] == 3
            # both gateways report the same replica: it must not count twice
            assert found["signalbox_generation_tokens_total", MODEL, "r0"] == 12
